//! The direct ways from drive to GPU, and what each needs, one by one: what `nvtier load` would find. Whether one really works, a load tells, which
//! tests it with real bytes before it trusts it.

use std::path::Path;

use gpudirect::paths::{self, PathState, Survey};
use gpudirect::remembered::Remembered;
use gpudirect::{DeviceInfo, Paths};

use crate::system::existing;
use crate::{Finding, Status, System};

const AREA: &str = "gpudirect";
const NEEDED: &str = "none: bounce always works, the others spare the processor and its memory";

pub(super) fn check(system: &System, path: &Path, out: &mut Vec<Finding>) {
    let mut devices = devices(system).peekable();
    if devices.peek().is_none() {
        out.push(
            Finding::info(AREA, "direct ways to the GPU", "no GPU: none of them is looked at").needs(NEEDED),
        );
    }
    for device in devices {
        let survey = match system.is_live() {
            true => paths::survey(&device, &existing(path)),
            false => {
                let none =
                    || Err(gpudirect::Error::new(gpudirect::ErrorKind::Unsupported, "no library here"));
                Paths::of(paths::System::at(system.at("/")), none, Remembered::nowhere())
                    .survey(&device, &existing(path))
            }
        };
        tell(&survey, out);
    }
}

/// GPUs by CUDA; of a machine that is only read about, those on its bus whose driver is loaded.
fn devices(system: &System) -> Box<dyn Iterator<Item = DeviceInfo>> {
    if system.is_live() {
        let open = |ordinal: u32| gpudirect::driver::open(&format!("cuda:{ordinal}")).ok()?.info().ok();
        return Box::new((0..).map_while(open));
    }
    let gpus = system.list("/proc/driver/nvidia/gpus").into_iter().enumerate();
    Box::new(gpus.map(|(ordinal, pci)| DeviceInfo {
        id: format!("cuda:{ordinal}"),
        name: String::new(),
        pci,
        memory_bytes: 0,
        free_bytes: 0,
        driver: String::new(),
    }))
}

fn tell(survey: &Survey, out: &mut Vec<Finding>) {
    for way in &survey.paths {
        let item = format!("{}: {}", survey.device.id, way.path);
        let finding = match way.usable {
            Some(true) if way.path == paths::BOUNCE => Finding::ok(AREA, item, "always works"),
            Some(true) => Finding::ok(AREA, item, "passed its self-test"),
            None => Finding::info(AREA, item, format!("may work: {}", way.why)),
            // Not a fault of the machine: the bounce path is the main road.
            Some(false) => Finding {
                effect: "bytes go through pinned host memory (bounce)".into(),
                remedy: "none is needed; where it is worth it, what the lines below do not have".into(),
                ..Finding::info(AREA, item, format!("not here: {}", way.why))
            },
        };
        out.push(finding.needs(NEEDED));
        conditions(way, out);
    }
}

fn conditions(way: &PathState, out: &mut Vec<Finding>) {
    for condition in &way.conditions {
        let finding = Finding::ok(AREA, format!("  {}", condition.needs), condition.found.clone());
        let status = match condition.met {
            Some(true) => Status::Ok,
            Some(false) => Status::Info,
            None => Status::Unknown,
        };
        out.push(Finding { status, needed: condition.needs.into(), ..finding });
    }
}
