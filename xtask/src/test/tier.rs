//! The tiers: what each one runs and needs.

use clap::ValueEnum;

use crate::needs::Group;

/// A tier. The order is the order in which they run: the cheapest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// Unit and property tests of every crate
    Unit,
    /// Packet rows through BPF_PROG_TEST_RUN
    Prog,
    /// The agent's side of the kernel: loading, adoption, maps, attachment, sweep
    Kernel,
    /// Real traffic between network namespaces
    Net,
    /// Source updates to map dumps, with faults injected
    Control,
    /// The L7 shim with real clients and servers on loopback
    L7,
    /// Real Docker engines
    E2e,
    /// Both bodies on Debian's 6.1 and 6.12 kernels, in QEMU
    Vm,
}

impl Tier {
    /// The name on the command line, which is the name of the test target in `tests/` too.
    pub fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Arguments for `cargo test` that select its tests.
    pub fn selection(self) -> Vec<String> {
        let words = match self {
            Self::Unit => [
                "lb-common",
                "lb-ebpf",
                "lb-route",
                "lb-l7",
                "lb-userspace",
                "xtask",
            ]
            .map(|p| ["-p", p])
            .concat(),
            _ => return vec!["-p".into(), "lb-tests".into(), "--test".into(), self.name()],
        };
        words.into_iter().map(Into::into).collect()
    }

    /// Tests at a time; `None` is one for each CPU. Bulk transfers are heavy: many side by side only make each other miss their
    /// deadlines. Those with engines mostly wait. The vm tier runs its guests side by side, and one test at a time in each.
    pub fn threads(self) -> Option<u32> {
        match self {
            Self::Unit | Self::Prog | Self::Control => None,
            Self::Kernel | Self::Net | Self::L7 | Self::E2e => Some(2),
            Self::Vm => Some(1),
        }
    }

    pub fn needs_root(self) -> bool {
        !matches!(self, Self::Unit | Self::L7 | Self::Vm)
    }

    /// Whether it starts the agent's binary, which it finds by WEIR_BIN.
    pub fn needs_agent(self) -> bool {
        matches!(self, Self::Net | Self::L7 | Self::E2e)
    }

    /// What has to be installed.
    pub fn groups(self) -> &'static [Group] {
        match self {
            Self::Unit => &[Group::Build],
            Self::Prog | Self::Kernel | Self::Net | Self::Control => &[Group::Build, Group::Test],
            Self::L7 => &[Group::Build, Group::L7],
            Self::E2e => &[Group::Build, Group::Test, Group::E2e],
            Self::Vm => &[Group::Build, Group::Vm],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_selects_the_test_target_of_its_name() {
        assert_eq!(Tier::E2e.selection(), ["-p", "lb-tests", "--test", "e2e"]);
        assert_eq!(Tier::Unit.selection()[..4], ["-p", "lb-common", "-p", "lb-ebpf"]);
    }

    #[test]
    fn unit_runs_without_root_and_first() {
        assert!(!Tier::Unit.needs_root());
        assert_eq!(Tier::value_variants()[0], Tier::Unit);
        assert_eq!(Tier::value_variants().last(), Some(&Tier::Vm));
    }
}
