//! `nvtier info DEVICE`: what an NVMe drive says about itself and its health.

use std::path::Path;

use nvme::passthrough::{self, Controller, Drive, ErrorLogEntry, Namespace, NodeKind, SmartLog};
use serde_json::{Value, json};

use crate::cli::Global;
use crate::failure::{Failure, Outcome};
use crate::{output, size};

/// Whether a path is a node that leads to a drive and not, of itself, to a pool: its controller's.
pub fn is_controller(path: &Path) -> bool {
    passthrough::is_controller(path)
}

/// Prints it.
pub fn run(global: &Global, path: &Path) -> Outcome {
    let facts =
        read(path).map_err(|error| Failure::from(error).while_doing(format!("ask {}", path.display())))?;
    if global.json { output::json(&json!({ "drive": facts.json() })) } else { output::line(&facts.text()) }
}

struct Facts {
    path: String,
    kind: NodeKind,
    controller: Controller,
    namespaces: Vec<Namespace>,
    smart: SmartLog,
    errors: Vec<ErrorLogEntry>,
}

fn read(path: &Path) -> nvme::Result<Facts> {
    let drive = Drive::open(path)?;
    let controller = drive.controller()?;
    let ids = match drive.namespace() {
        Some(id) => vec![id],
        None => drive.namespaces()?,
    };
    Ok(Facts {
        path: drive.name().to_owned(),
        kind: drive.kind(),
        namespaces: ids.into_iter().map(|id| drive.identify_namespace(id)).collect::<nvme::Result<_>>()?,
        smart: drive.smart()?,
        errors: drive.error_log(controller.error_log_entries)?,
        controller,
    })
}

/// A number, or text where JSON's numbers may not hold it.
fn wide(number: u128) -> Value {
    u64::try_from(number).map_or_else(|_| number.to_string().into(), Value::from)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes in words; of a counter that a drive filled with nonsense, the most that can be said.
fn bytes(number: u128) -> String {
    size::human(u64::try_from(number).unwrap_or(u64::MAX))
}

impl Facts {
    fn json(&self) -> Value {
        let (controller, smart) = (&self.controller, &self.smart);
        json!({
            "path": self.path,
            "node": match self.kind {
                NodeKind::Controller => "controller",
                NodeKind::Block => "block",
                NodeKind::Generic => "generic",
            },
            "controller": {
                "model": controller.model,
                "serial": controller.serial,
                "firmware": controller.firmware,
                "version": controller.version.to_string(),
                "vendor_id": controller.vendor_id,
                "controller_id": controller.controller_id,
                "subsystem_nqn": controller.subsystem_nqn,
                "max_transfer_bytes": controller.max_transfer_bytes(),
                "write_cache": controller.has_write_cache(),
                "deallocate": controller.can_deallocate(),
                "total_capacity_bytes": wide(controller.total_capacity_bytes),
                "unallocated_capacity_bytes": wide(controller.unallocated_capacity_bytes),
                "warning_temperature_k": controller.warning_temperature_k,
                "critical_temperature_k": controller.critical_temperature_k,
            },
            "namespaces": self.namespaces.iter().map(namespace).collect::<Vec<_>>(),
            "smart": {
                "critical_warning": smart.critical_warning,
                "warnings": smart.warnings(),
                "temperature_k": smart.temperature_k,
                "available_spare_percent": smart.available_spare_percent,
                "available_spare_threshold_percent": smart.available_spare_threshold_percent,
                "percentage_used": smart.percentage_used,
                "data_units_read": wide(smart.data_units_read),
                "data_units_written": wide(smart.data_units_written),
                "host_read_commands": wide(smart.host_read_commands),
                "host_write_commands": wide(smart.host_write_commands),
                "controller_busy_min": wide(smart.controller_busy_min),
                "power_cycles": wide(smart.power_cycles),
                "power_on_h": wide(smart.power_on_h),
                "unsafe_shutdowns": wide(smart.unsafe_shutdowns),
                "media_errors": wide(smart.media_errors),
                "error_log_entries": wide(smart.error_log_entries),
                "warning_temperature_min": smart.warning_temperature_min,
                "critical_temperature_min": smart.critical_temperature_min,
                "temperature_sensors_k": smart.temperature_sensors_k,
            },
            "errors": self.errors.iter().map(|entry| json!({
                "count": entry.error_count,
                "status": entry.status.raw(),
                "name": entry.status.name(),
                "queue": entry.queue_id,
                "command": entry.command_id,
                "lba": entry.lba,
                "namespace": entry.namespace,
            })).collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> String {
        let (controller, smart) = (&self.controller, &self.smart);
        let limit = controller.max_transfer_bytes().map_or("any size".into(), size::human);
        let cache =
            if controller.has_write_cache() { "a volatile write cache" } else { "no volatile write cache" };
        let mut lines = vec![
            format!("drive        {}", self.path),
            format!("model        {} (firmware {})", controller.model, controller.firmware),
            format!("serial       {}", controller.serial),
            format!("interface    NVMe {}, transfers of {limit} at most, {cache}", controller.version),
        ];
        for namespace in &self.namespaces {
            let size = namespace.size_bytes().map_or("an unknown size".into(), size::human);
            let lba = namespace.format().map_or("an unknown format".into(), |format| {
                let lba = format.lba_bytes.map_or("unknown size".into(), |lba| format!("{lba} bytes"));
                match format.metadata_bytes {
                    0 => format!("blocks of {lba}"),
                    metadata => format!("blocks of {lba} and {metadata} bytes of metadata"),
                }
            });
            lines.push(format!(
                "namespace {:<2} {size}, {lba} (format {})",
                namespace.id, namespace.format_index
            ));
        }
        lines.push(match &smart.warnings()[..] {
            [] => "warnings     none".to_owned(),
            warnings => format!("WARNING      {}", warnings.join("; ")),
        });
        lines.push(format!("temperature  {} C", smart.temperature_c()));
        lines.push(format!(
            "wear         {}% of its life used, {}% spare left (it warns below {}%)",
            smart.percentage_used, smart.available_spare_percent, smart.available_spare_threshold_percent
        ));
        lines.push(format!(
            "moved        {} read, {} written",
            bytes(smart.read_bytes()),
            bytes(smart.written_bytes())
        ));
        lines.push(format!(
            "power        {} hours on, {} cycles, {} unsafe shutdowns",
            smart.power_on_h, smart.power_cycles, smart.unsafe_shutdowns
        ));
        lines.push(format!(
            "errors       {} of the medium, {} in its log ever",
            smart.media_errors, smart.error_log_entries
        ));
        for entry in &self.errors {
            lines.push(format!(
                "             {} at block {} of namespace {}",
                entry.status, entry.lba, entry.namespace
            ));
        }
        lines.join("\n")
    }
}

fn namespace(namespace: &Namespace) -> Value {
    json!({
        "id": namespace.id,
        "size_bytes": namespace.size_bytes(),
        "size_blocks": namespace.size_blocks,
        "capacity_blocks": namespace.capacity_blocks,
        "used_blocks": namespace.used_blocks,
        "lba_bytes": namespace.format().and_then(|format| format.lba_bytes),
        "format": namespace.format_index,
        "formats": namespace.formats.iter().map(|format| json!({
            "index": format.index,
            "lba_bytes": format.lba_bytes,
            "metadata_bytes": format.metadata_bytes,
            "relative_performance": format.relative_performance,
        })).collect::<Vec<_>>(),
        "nguid": hex(&namespace.nguid),
        "eui64": hex(&namespace.eui64),
    })
}
