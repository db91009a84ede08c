//! What a drive says about itself, beside what nvme-cli makes of it.

use std::process::Command;

use nvme::passthrough::Drive;
use serde_json::Value;

use super::{node, nvme_json, output};
use crate::report::{Checked, ensure, equal};

/// A number that nvme-cli prints as one or, where it may be large, as text.
fn number(json: &Value, key: &str) -> Checked<u128> {
    let value = &json[key];
    let number = value.as_u64().map(u128::from).or_else(|| value.as_str().and_then(|text| text.parse().ok()));
    Ok(number.ok_or_else(|| format!("nvme-cli gives no number {key}: {value}"))?)
}

fn text(json: &Value, key: &str) -> Checked<String> {
    Ok(json[key].as_str().ok_or_else(|| format!("nvme-cli gives no text {key}"))?.trim().to_owned())
}

/// `nvtier info` of a drive, as JSON and in words.
pub fn command(serial: &str, lba: u32) -> Checked {
    for name in [serial.to_owned(), format!("{serial}-ng"), format!("{serial}-ctrl")] {
        let path = node(&name)?;
        let path = path.to_string_lossy().into_owned();
        let info: Value = serde_json::from_str(&output("nvtier", &["info", "--drive", "--json", &path])?)?;
        let info = &info["drive"];
        let (controller, smart) = (nvme_json(&["id-ctrl", &path])?, nvme_json(&["smart-log", &path])?);
        equal("serial", info["controller"]["serial"].as_str(), Some(serial))?;
        equal("model", text(&info["controller"], "model")?, text(&controller, "mn")?)?;
        equal(
            "MDTS",
            number(&info["controller"], "max_transfer_bytes")?,
            4096 << number(&controller, "mdts")?,
        )?;
        equal("block", number(&info["namespaces"][0], "lba_bytes")?, lba.into())?;
        for key in ["data_units_read", "data_units_written", "host_read_commands", "host_write_commands"] {
            equal(key, number(&info["smart"], key)?, number(&smart, key)?)?;
        }
        let words = output("nvtier", &["info", "--drive", &path])?;
        for part in
            ["QEMU NVMe Ctrl", &format!("blocks of {lba} bytes"), "temperature  50 C", "warnings     none"]
        {
            ensure(words.contains(part), || format!("no {part:?} in {words}"))?;
        }
    }
    // A controller needs no flag: it is nothing else.
    let words = output("nvtier", &["info", &node(&format!("{serial}-ctrl"))?.to_string_lossy()])?;
    ensure(words.contains("QEMU NVMe Ctrl"), || words.clone())
}

/// `nvtier doctor`: what it says of the drive is what nvme-cli says.
pub fn doctor(serial: &str, lba: u32) -> Checked {
    let path = node(&format!("{serial}-ctrl"))?;
    let controller = std::fs::canonicalize(&path)?;
    let name = controller.file_name().ok_or("no name")?.to_string_lossy().into_owned();
    let path = path.to_string_lossy().into_owned();
    let (smart, ns) = (nvme_json(&["smart-log", &path])?, nvme_json(&["id-ns", &path, "-n", "1"])?);
    // Its exit code is its verdict.
    let ran = Command::new("nvtier").args(["doctor", "--json", "/"]).output()?;
    let report: Value = serde_json::from_slice(&ran.stdout)?;
    let findings = report["findings"].as_array().ok_or("no findings")?;
    let found = |item: &str| -> Checked<String> {
        let finding = findings.iter().find(|finding| finding["item"] == item);
        let finding = finding.ok_or_else(|| format!("no {item} in {report:#}"))?;
        Ok(finding["found"].as_str().unwrap_or_default().to_owned())
    };
    let says = |item: &str, part: &str| -> Checked {
        let said = found(item)?;
        ensure(said.contains(part), || format!("no {part:?} in {item}: {said}"))
    };
    says(&name, "QEMU NVMe Ctrl")?;
    says(&format!("{name} largest command (MDTS)"), "KiB")?;
    let used = number(&smart, "percent_used")?;
    says(&format!("{name} health"), &format!("{used}% of its rated endurance used"))?;
    let block = format!("{name}n1");
    says(&block, &format!("logical blocks of {lba} bytes"))?;
    says(&block, &format!("format {} in use", number(&ns, "flbas")? & 15))?;
    let all = ns["lbafs"].as_array().ok_or("nvme-cli gives no formats")?.iter().enumerate();
    for (index, format) in all {
        let metadata = match number(format, "ms")? {
            0 => String::new(),
            bytes => format!(" with {bytes} of metadata"),
        };
        says(&block, &format!("{index}: {} bytes{metadata}, ", 1u64 << number(format, "ds")?))?;
    }
    says(&format!("{block} rated endurance"), "QEMU NVMe Ctrl")
}

/// Through each of the three nodes of the drive.
pub fn equal_nvme_cli(serial: &str, lba: u32) -> Checked {
    for name in [serial.to_owned(), format!("{serial}-ng"), format!("{serial}-ctrl")] {
        let path = node(&name)?;
        let drive = Drive::open(&path)?;
        let path = path.to_string_lossy().into_owned();
        controller(&drive, &nvme_json(&["id-ctrl", &path])?)?;
        equal("namespaces", drive.namespaces()?, vec![1])?;
        namespace(&drive, &nvme_json(&["id-ns", &path, "-n", "1"])?, lba)?;
        smart(&drive, &nvme_json(&["smart-log", &path])?)?;
        let entries = drive.error_log(drive.controller()?.error_log_entries)?;
        let theirs = nvme_json(&["error-log", &path])?;
        let used = |entry: &&Value| entry["error_count"].as_u64() != Some(0);
        let theirs = theirs["errors"].as_array().map_or(0, |errors| errors.iter().filter(used).count());
        equal("entries of the error log", entries.len(), theirs)?;
    }
    Ok(())
}

fn controller(drive: &Drive, json: &Value) -> Checked {
    let ours = drive.controller()?;
    let version = u128::from(ours.version.major) << 16
        | u128::from(ours.version.minor) << 8
        | u128::from(ours.version.tertiary);
    for (key, value) in [
        ("vid", u128::from(ours.vendor_id)),
        ("ssvid", ours.subsystem_vendor_id.into()),
        ("ieee", ours.ieee.into()),
        ("cntlid", ours.controller_id.into()),
        ("ver", version),
        ("mdts", ours.mdts.into()),
        ("oacs", ours.optional_admin.into()),
        ("oncs", ours.optional_nvm.into()),
        ("elpe", u128::from(ours.error_log_entries) - 1),
        ("npss", u128::from(ours.power_states) - 1),
        ("wctemp", ours.warning_temperature_k.into()),
        ("cctemp", ours.critical_temperature_k.into()),
        ("tnvmcap", ours.total_capacity_bytes),
        ("unvmcap", ours.unallocated_capacity_bytes),
        ("nn", ours.namespaces.into()),
        ("vwc", ours.write_cache.into()),
        ("awun", ours.atomic_write_blocks.into()),
        ("awupf", ours.atomic_write_power_fail_blocks.into()),
        ("sgls", ours.sgls.into()),
    ] {
        equal(key, value, number(json, key)?)?;
    }
    equal("sn", ours.serial, text(json, "sn")?)?;
    equal("mn", ours.model, text(json, "mn")?)?;
    equal("fr", ours.firmware, text(json, "fr")?)?;
    equal("subnqn", ours.subsystem_nqn, text(json, "subnqn")?)
}

fn namespace(drive: &Drive, json: &Value, lba: u32) -> Checked {
    let ours = drive.identify_namespace(1)?;
    for (key, value) in [
        ("nsze", u128::from(ours.size_blocks)),
        ("ncap", ours.capacity_blocks.into()),
        ("nuse", ours.used_blocks.into()),
        ("nsfeat", ours.features.into()),
        ("flbas", u128::from(ours.format_index) | u128::from(ours.metadata_inline) << 4),
        ("dps", ours.protection.into()),
        ("nlbaf", ours.formats.len() as u128 - 1),
        ("nvmcap", ours.nvm_capacity_bytes),
        ("noiob", ours.optimal_boundary_blocks.into()),
        ("npwg", ours.preferred_write_blocks.into()),
        ("npwa", ours.preferred_alignment_blocks.into()),
    ] {
        equal(key, value, number(json, key)?)?;
    }
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    equal("nguid", hex(&ours.nguid), text(json, "nguid")?)?;
    equal("eui64", hex(&ours.eui64), text(json, "eui64")?)?;
    equal("block in use", ours.format().and_then(|format| format.lba_bytes), Some(lba))?;
    let theirs = json["lbafs"].as_array().ok_or("nvme-cli gives no formats")?;
    equal("formats", ours.formats.len(), theirs.len())?;
    for (format, json) in ours.formats.iter().zip(theirs) {
        equal("ms", format.metadata_bytes.into(), number(json, "ms")?)?;
        equal("ds", format.lba_shift.into(), number(json, "ds")?)?;
        equal("rp", format.relative_performance.into(), number(json, "rp")?)?;
    }
    Ok(())
}

fn smart(drive: &Drive, json: &Value) -> Checked {
    let ours = drive.smart()?;
    for (key, value) in [
        ("critical_warning", u128::from(ours.critical_warning)),
        ("temperature", ours.temperature_k.into()),
        ("avail_spare", ours.available_spare_percent.into()),
        ("spare_thresh", ours.available_spare_threshold_percent.into()),
        ("percent_used", ours.percentage_used.into()),
        ("data_units_read", ours.data_units_read),
        ("data_units_written", ours.data_units_written),
        ("host_read_commands", ours.host_read_commands),
        ("host_write_commands", ours.host_write_commands),
        ("controller_busy_time", ours.controller_busy_min),
        ("power_cycles", ours.power_cycles),
        ("power_on_hours", ours.power_on_h),
        ("unsafe_shutdowns", ours.unsafe_shutdowns),
        ("media_errors", ours.media_errors),
        ("num_err_log_entries", ours.error_log_entries),
        ("warning_temp_time", ours.warning_temperature_min.into()),
        ("critical_comp_time", ours.critical_temperature_min.into()),
    ] {
        equal(key, value, number(json, key)?)?;
    }
    equal("a drive that moved data says so", ours.host_read_commands > 0 && ours.data_units_read > 0, true)
}
