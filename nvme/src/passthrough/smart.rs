//! The SMART / Health Information log page (NVMe Base Specification 2.0, figure 207).

use nvme_sys::{le128, nvme_smart_log};

/// Bytes that one data unit stands for: a thousand units of 512 bytes, rounded up by the drive.
pub const DATA_UNIT_BYTES: u128 = 512_000;

/// Health of a drive over its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmartLog {
    /// Critical warnings, bits; see [`SmartLog::warnings`].
    pub critical_warning: u8,
    /// Composite temperature, kelvin.
    pub temperature_k: u16,
    /// Spare capacity left, percent.
    pub available_spare_percent: u8,
    /// Below this much spare capacity the drive warns, percent.
    pub available_spare_threshold_percent: u8,
    /// Estimate of life used, percent; may go over 100, 255 stands for anything above 254.
    pub percentage_used: u8,
    /// Summary of endurance groups' warnings, bits.
    pub endurance_group_warning: u8,
    /// Read from the drive, units of [`DATA_UNIT_BYTES`].
    pub data_units_read: u128,
    /// Written to the drive, units of [`DATA_UNIT_BYTES`].
    pub data_units_written: u128,
    /// Read commands.
    pub host_read_commands: u128,
    /// Write commands.
    pub host_write_commands: u128,
    /// Busy with I/O, minutes.
    pub controller_busy_min: u128,
    /// Power cycles.
    pub power_cycles: u128,
    /// Powered on, hours.
    pub power_on_h: u128,
    /// Power losses without a shutdown before.
    pub unsafe_shutdowns: u128,
    /// Errors of medium and data integrity that were not recovered.
    pub media_errors: u128,
    /// Entries that the error log ever had.
    pub error_log_entries: u128,
    /// At or over the warning temperature, minutes.
    pub warning_temperature_min: u32,
    /// At or over the critical temperature, minutes.
    pub critical_temperature_min: u32,
    /// Temperature sensors 1 to 8, kelvin; 0: there is none.
    pub temperature_sensors_k: [u16; 8],
}

/// Bits of the critical warning, lowest first.
const WARNINGS: [&str; 6] = [
    "available spare is below its threshold",
    "temperature is outside its thresholds",
    "reliability is degraded by media or internal errors",
    "the medium is read-only",
    "the volatile memory backup has failed",
    "the persistent memory region is read-only",
];

impl SmartLog {
    pub(crate) fn decode(raw: &nvme_smart_log) -> SmartLog {
        SmartLog {
            critical_warning: raw.critical_warning,
            temperature_k: u16::from_le_bytes(raw.temperature),
            available_spare_percent: raw.avail_spare,
            available_spare_threshold_percent: raw.spare_thresh,
            percentage_used: raw.percent_used,
            endurance_group_warning: raw.endu_grp_crit_warn_sumry,
            data_units_read: le128(raw.data_units_read),
            data_units_written: le128(raw.data_units_written),
            host_read_commands: le128(raw.host_reads),
            host_write_commands: le128(raw.host_writes),
            controller_busy_min: le128(raw.ctrl_busy_time),
            power_cycles: le128(raw.power_cycles),
            power_on_h: le128(raw.power_on_hours),
            unsafe_shutdowns: le128(raw.unsafe_shutdowns),
            media_errors: le128(raw.media_errors),
            error_log_entries: le128(raw.num_err_log_entries),
            warning_temperature_min: u32::from_le(raw.warning_temp_time),
            critical_temperature_min: u32::from_le(raw.critical_comp_time),
            temperature_sensors_k: raw.temp_sensor.map(u16::from_le),
        }
    }

    /// The critical warnings in words.
    pub fn warnings(&self) -> Vec<&'static str> {
        let set = |bit: &usize| self.critical_warning & (1 << bit) != 0;
        (0..WARNINGS.len()).filter(set).map(|bit| WARNINGS[bit]).collect()
    }

    /// Bytes written by hosts over the drive's life, to the drive's own granularity.
    pub fn written_bytes(&self) -> u128 {
        self.data_units_written.saturating_mul(DATA_UNIT_BYTES)
    }

    /// Bytes read likewise.
    pub fn read_bytes(&self) -> u128 {
        self.data_units_read.saturating_mul(DATA_UNIT_BYTES)
    }

    /// Composite temperature, degrees Celsius.
    pub fn temperature_c(&self) -> i32 {
        i32::from(self.temperature_k) - 273
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_captured_log_is_decoded_as_nvme_cli_does() {
        let page = include_bytes!("captured/smart.bin");
        let smart = SmartLog::decode(&nvme_sys::from_bytes(page).unwrap());
        assert_eq!((smart.temperature_k, smart.temperature_c(), smart.critical_warning), (323, 50, 0));
        assert_eq!((smart.data_units_read, smart.data_units_written), (82, 62));
        assert_eq!((smart.host_read_commands, smart.host_write_commands), (81, 60));
        // The emulator's only fields beside these are zeros.
        assert_eq!((smart.available_spare_percent, smart.power_cycles, smart.media_errors), (0, 0, 0));
    }

    #[test]
    fn every_field_has_its_place() {
        let mut page = [0u8; 512];
        page[0] = 0b101;
        page[1..3].copy_from_slice(&323u16.to_le_bytes());
        page[3..6].copy_from_slice(&[98, 10, 3]);
        let mut counter = |index: usize, value: u128| {
            page[32 + 16 * index..48 + 16 * index].copy_from_slice(&value.to_le_bytes());
        };
        for index in 0..10 {
            counter(index, 1000 + index as u128);
        }
        counter(1, u128::MAX);
        page[192..196].copy_from_slice(&7u32.to_le_bytes());
        page[200..202].copy_from_slice(&300u16.to_le_bytes());
        let smart = SmartLog::decode(&nvme_sys::from_bytes(&page).unwrap());
        assert_eq!(smart.temperature_c(), 50);
        assert_eq!((smart.available_spare_percent, smart.available_spare_threshold_percent), (98, 10));
        assert_eq!(smart.percentage_used, 3);
        assert_eq!(smart.warnings(), [WARNINGS[0], WARNINGS[2]]);
        assert_eq!(smart.read_bytes(), 512_000_000);
        assert_eq!(
            smart.written_bytes(),
            u128::MAX,
            "a counter that a drive filled with ones does not overflow"
        );
        assert_eq!((smart.unsafe_shutdowns, smart.media_errors, smart.error_log_entries), (1007, 1008, 1009));
        assert_eq!((smart.warning_temperature_min, smart.temperature_sensors_k[0]), (7, 300));
    }
}
