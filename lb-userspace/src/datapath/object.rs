//! The BPF object that the agent carries with it.

/// The compiled programs of `lb-ebpf`, aligned as an ELF parser wants them. Empty if the agent was compiled without them
/// (`cargo check` before `cargo xtask build-ebpf`): ask [`programs`], which refuses that.
pub static BPF_OBJECT: &[u8] = aya::include_bytes_aligned!(env!("WEIR_BPF_OBJECT"));

/// The agent was compiled without its programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this agent was compiled without its BPF programs: run `cargo xtask build-ebpf` and build it again")]
pub struct NoPrograms;

/// [`BPF_OBJECT`], if there is something in it.
pub fn programs() -> Result<&'static [u8], NoPrograms> {
    not_empty(BPF_OBJECT)
}

fn not_empty(object: &[u8]) -> Result<&[u8], NoPrograms> {
    if object.is_empty() {
        Err(NoPrograms)
    } else {
        Ok(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_object_is_refused_with_the_remedy() {
        let error = not_empty(&[]).unwrap_err();
        assert!(error.to_string().contains("cargo xtask build-ebpf"), "{error}");
        assert_eq!(not_empty(b"elf"), Ok(b"elf".as_slice()));
    }

    #[test]
    fn the_object_is_aligned_for_its_parser() {
        assert_eq!(BPF_OBJECT.as_ptr().addr() % 8, 0);
    }
}
