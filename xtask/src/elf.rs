//! As much of ELF as it takes to see that an object is a BPF object with type information (BTF).

use anyhow::{Context, Result, bail};

const EM_BPF: u16 = 247;

/// Fails unless `bytes` is a little-endian 64-bit BPF object with a section `.BTF`: without it the kernel knows no field
/// names, and `bpftool map dump` shows bytes.
pub fn check_bpf_object(bytes: &[u8]) -> Result<()> {
    if bytes.get(..6) != Some(b"\x7fELF\x02\x01") || number::<2>(bytes, 18)? != u64::from(EM_BPF) {
        bail!("is no BPF object");
    }
    if !section_names(bytes)?.contains(&".BTF") {
        bail!(
            "has no section .BTF: the linker was not asked for it, or the programs have no debug information"
        );
    }
    Ok(())
}

/// Names of all sections.
fn section_names(bytes: &[u8]) -> Result<Vec<&str>> {
    let headers = number::<8>(bytes, 40)? as usize;
    let size = number::<2>(bytes, 58)? as usize;
    let count = number::<2>(bytes, 60)? as usize;
    let names_section = number::<2>(bytes, 62)? as usize;
    let header = |index: usize| headers.saturating_add(index.saturating_mul(size));
    let names = number::<8>(bytes, header(names_section).saturating_add(24))? as usize;
    (0..count)
        .map(|index| {
            let start = names.saturating_add(number::<4>(bytes, header(index))? as usize);
            let rest = bytes
                .get(start..)
                .context("is cut off: a section's name is outside of the file")?;
            let end = rest
                .iter()
                .position(|byte| *byte == 0)
                .context("has a section name without end")?;
            std::str::from_utf8(&rest[..end]).context("has a section name that is no text")
        })
        .collect()
}

/// The little-endian number of `N` bytes at `at`.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at.saturating_add(N)).context("is cut off")?;
    let mut value = [0; 8];
    value[..N].copy_from_slice(field);
    Ok(u64::from_le_bytes(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An object with the sections `""` (the names) and `name`.
    fn object(machine: u16, name: &str) -> Vec<u8> {
        let names = format!("\0{name}\0");
        let headers = 64 + names.len();
        let mut bytes = vec![0; headers + 2 * 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[40..48].copy_from_slice(&(headers as u64).to_le_bytes());
        bytes[58..60].copy_from_slice(&64u16.to_le_bytes());
        bytes[60..62].copy_from_slice(&2u16.to_le_bytes());
        bytes[64..headers].copy_from_slice(names.as_bytes());
        bytes[headers + 24..headers + 32].copy_from_slice(&64u64.to_le_bytes());
        bytes[headers + 64..headers + 68].copy_from_slice(&1u32.to_le_bytes());
        bytes
    }

    #[test]
    fn an_object_with_btf_is_accepted_and_one_without_is_not() {
        check_bpf_object(&object(EM_BPF, ".BTF")).unwrap();
        let error = check_bpf_object(&object(EM_BPF, ".BTF.ext")).unwrap_err();
        assert!(error.to_string().contains("no section .BTF"), "{error}");
    }

    #[test]
    fn other_files_are_refused() {
        assert!(check_bpf_object(&object(62, ".BTF")).is_err(), "x86-64");
        assert!(check_bpf_object(b"").is_err());
        let whole = object(EM_BPF, ".BTF");
        for length in 0..whole.len() - 64 {
            assert!(check_bpf_object(&whole[..length]).is_err(), "cut at {length}");
        }
    }
}
