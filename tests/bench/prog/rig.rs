//! The bodies and the programs that measure them, loaded; one run at a time.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions,
    maps::{Array, ProgramArray},
    programs::{ProgramFd, SchedClassifier, TestRunResult, Xdp},
};
use lb_ebpf::template::{FRAME, Template};
use lb_tests::{
    kernel::{Kernel, Program, Sizes, jiffies, object_path},
    row::Datapath as _,
    slots,
    world::{NIC, ifindex_of},
};

use super::cases::{self, BACKEND_RECORDS, Case, FRESH, Flows, Kind};

/// Flows that each flow table is for: those of the largest case and some.
const FLOWS: u32 = 1 << 20;
/// The programs of `PROGRAMS` by what is measured.
const EMPTY: u32 = 0;
const BODY: u32 = 1;

/// [`Template`] as a map value.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Value(Template);
// SAFETY: `repr(C)`, integers without implicit padding.
unsafe impl aya::Pod for Value {}

pub struct Rig {
    kernel: Kernel,
    bench: Ebpf,
    /// How many flows of each kind are in the tables.
    there: BTreeMap<Kind, u32>,
}

impl Rig {
    /// Loads everything and sets the world; no flows yet.
    pub fn new() -> Result<Self> {
        let mut kernel = Kernel::load_sized(Sizes {
            flows: FLOWS,
            backends: BACKEND_RECORDS,
            services: 16,
        })?;
        kernel.set(&cases::world())?;
        let path = object_path().with_file_name("weir-bench.o");
        let object = std::fs::read(&path)
            .with_context(|| format!("{}: `cargo xtask bench` builds it", path.display()))?;
        let mut bench = EbpfLoader::new()
            .load(&object)
            .context("weir-bench.o does not load")?;
        for name in ["bench_xdp", "empty_xdp"] {
            xdp(&mut bench, name)?.load().context(name)?;
        }
        for name in ["bench_tc", "empty_tc"] {
            tc(&mut bench, name)?.load().context(name)?;
        }
        let weir = xdp(kernel.object(), "weir_xdp")?.fd()?.try_clone()?;
        let empty = xdp(&mut bench, "empty_xdp")?.fd()?.try_clone()?;
        fill(&mut bench, "XDP_PROGRAMS", &weir, &empty)?;
        let weir = tc(kernel.object(), "weir_tc_ingress")?.fd()?.try_clone()?;
        let empty = tc(&mut bench, "empty_tc")?.fd()?.try_clone()?;
        fill(&mut bench, "TC_PROGRAMS", &weir, &empty)?;
        Ok(Self {
            kernel,
            bench,
            there: BTreeMap::new(),
        })
    }

    /// How many instructions the verifier walked, by program.
    pub fn instructions(&mut self) -> Result<Vec<(&'static str, u32)>> {
        let mut all = Vec::new();
        for name in ["weir_xdp", "weir_tc_ingress", "weir_tc_egress"] {
            let program = self.kernel.object().program(name).context(name)?;
            let count = program.info()?.verified_instruction_count();
            all.push((name, count.context("a kernel that does not tell")?));
        }
        Ok(all)
    }

    /// Puts the flows of a case into the tables, and proves that the body does what the case is about.
    pub fn prepare(&mut self, case: &Case) -> Result<()> {
        if let Flows::Known(kind, count) = case.flows {
            let now = jiffies()?;
            let there = self.there.entry(kind).or_default();
            let flows = self.kernel.flow_maps(None)?;
            for flow in *there..count {
                slots::insert(&flows, &kind.conn(flow), now)?;
            }
            *there = count.max(*there);
        }
        self.time(case, true).map(drop)
    }

    /// ns per packet of one run of the body, or of the empty program.
    pub fn time(&mut self, case: &Case, body: bool) -> Result<f64> {
        let frame = frame_of(case);
        let (address_at, port_at) = case.offsets(&frame);
        let (flows, runs) = match case.flows {
            Flows::None(count) | Flows::Known(_, count) => (count, 0),
            Flows::New(_) => (0, FRESH),
        };
        let mut words = [0; FRAME / 8];
        for (word, bytes) in words.iter_mut().zip(frame.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let template = Template {
            frame: words,
            address_at,
            port_at,
            flows,
            runs,
            program: if body { BODY } else { EMPTY },
            _pad: 0,
        };
        let map = self.bench.map_mut("TEMPLATE").context("no map TEMPLATE")?;
        Array::<_, Value>::try_from(map)?.set(0, Value(template), 0)?;
        let result = self.run(case, &frame)?;
        if body {
            ensure!(
                result.return_value as i32 == case.action,
                "{}: the program returned {} instead of {}",
                case.name,
                result.return_value as i32,
                case.action
            );
            if let Flows::New(kind) = case.flows {
                self.forget(kind, case.packets()).with_context(|| case.name)?;
            }
        }
        Ok(result.duration.as_nanos() as f64)
    }

    fn run(&mut self, case: &Case, frame: &[u8]) -> Result<TestRunResult> {
        let ifindex = ifindex_of(NIC);
        let mut context = [0u32; 48];
        // struct xdp_md: data_end is word 1, ingress_ifindex word 3; struct __sk_buff: words 9 and 10.
        let length = if case.program == Program::Xdp {
            (context[1], context[3]) = (frame.len() as u32, ifindex);
            6
        } else {
            (context[9], context[10]) = (ifindex, ifindex);
            48
        };
        let context: Vec<u8> = context[..length].iter().flat_map(|w| w.to_ne_bytes()).collect();
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context),
            repeat: case.packets(),
            ..TestRunOptions::new()
        };
        Ok(match case.program {
            Program::Xdp => xdp(&mut self.bench, "bench_xdp")?.test_run(options)?,
            _ => tc(&mut self.bench, "bench_tc")?.test_run(options)?,
        })
    }

    /// Removes the flows that a run has opened. Every packet must have opened one.
    fn forget(&mut self, kind: Kind, count: u32) -> Result<()> {
        let flows = self.kernel.flow_maps(None)?;
        for flow in FRESH..FRESH + count {
            ensure!(slots::remove(&flows, &kind.conn(flow)), "a packet opened no flow");
        }
        Ok(())
    }
}

/// The frame, padded as Ethernet pads short ones.
fn frame_of(case: &Case) -> Vec<u8> {
    let mut frame = case.packet.build();
    frame.resize(frame.len().max(FRAME), 0);
    frame
}

fn xdp<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    Ok(object
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()?)
}

fn tc<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    Ok(object
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()?)
}

fn fill(bench: &mut Ebpf, map: &str, body: &ProgramFd, empty: &ProgramFd) -> Result<()> {
    let mut programs = ProgramArray::try_from(bench.map_mut(map).with_context(|| format!("no map {map}"))?)?;
    programs.set(BODY, body, 0)?;
    Ok(programs.set(EMPTY, empty, 0)?)
}
