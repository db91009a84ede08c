//! What a controller and a namespace say about themselves (NVMe Base Specification 2.0, figure 275; NVM Command Set
//! Specification 1.0, figure 97). Names are the specification's, spelled out; units are in the names.

use nvme_sys::{lba_format_index, le128, nvme_id_ctrl, nvme_id_ns};

/// A version of the specification: 2.0.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Major.
    pub major: u16,
    /// Minor.
    pub minor: u8,
    /// Tertiary.
    pub tertiary: u8,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.tertiary)
    }
}

/// Identify Controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    /// PCI vendor (VID).
    pub vendor_id: u16,
    /// PCI subsystem vendor (SSVID).
    pub subsystem_vendor_id: u16,
    /// Serial number (SN), without its padding.
    pub serial: String,
    /// Model number (MN), without its padding.
    pub model: String,
    /// Firmware revision (FR), without its padding.
    pub firmware: String,
    /// IEEE OUI identifier, as a number.
    pub ieee: u32,
    /// Controller id (CNTLID).
    pub controller_id: u16,
    /// Version that it claims (VER).
    pub version: Version,
    /// Maximum data transfer size (MDTS): a power of two, in units of the smallest page. 0: no limit.
    pub mdts: u8,
    /// Optional admin commands (OACS), bits.
    pub optional_admin: u16,
    /// Optional I/O commands (ONCS), bits.
    pub optional_nvm: u16,
    /// Error log entries that it keeps (ELPE, made 1's based).
    pub error_log_entries: u16,
    /// Power states (NPSS, made 1's based).
    pub power_states: u8,
    /// Warning composite temperature (WCTEMP), kelvin; 0: not reported.
    pub warning_temperature_k: u16,
    /// Critical composite temperature (CCTEMP), kelvin; 0: not reported.
    pub critical_temperature_k: u16,
    /// Total NVM capacity (TNVMCAP), bytes; 0: not reported.
    pub total_capacity_bytes: u128,
    /// Unallocated NVM capacity (UNVMCAP), bytes.
    pub unallocated_capacity_bytes: u128,
    /// Number of the highest namespace (NN).
    pub namespaces: u32,
    /// Volatile write cache (VWC), bits; bit 0: there is one, so flushes matter.
    pub write_cache: u8,
    /// Atomic write unit, normal (AWUN), logical blocks, 0's based.
    pub atomic_write_blocks: u16,
    /// Atomic write unit, power fail (AWUPF), logical blocks, 0's based.
    pub atomic_write_power_fail_blocks: u16,
    /// SGL support (SGLS), bits.
    pub sgls: u32,
    /// NVM subsystem's qualified name (SUBNQN).
    pub subsystem_nqn: String,
}

/// Smallest memory page that a controller may choose (CAP.MPSMIN), bytes. It is a register that passthrough does not reach; no
/// drive for PCs has another one, and the kernel refuses controllers whose smallest page is larger than the CPU's.
const PAGE_MIN_BYTES: u64 = 4096;

impl Controller {
    pub(crate) fn decode(raw: &nvme_id_ctrl) -> Controller {
        let version = u32::from_le(raw.ver);
        let bytes = nvme_sys::as_bytes(raw);
        Controller {
            vendor_id: u16::from_le(raw.vid),
            subsystem_vendor_id: u16::from_le(raw.ssvid),
            serial: text(&bytes[4..24]),
            model: text(&bytes[24..64]),
            firmware: text(&bytes[64..72]),
            ieee: u32::from_le_bytes([raw.ieee[0], raw.ieee[1], raw.ieee[2], 0]),
            controller_id: u16::from_le(raw.cntlid),
            version: Version {
                major: (version >> 16) as u16,
                minor: (version >> 8) as u8,
                tertiary: version as u8,
            },
            mdts: raw.mdts,
            optional_admin: u16::from_le(raw.oacs),
            optional_nvm: u16::from_le(raw.oncs),
            error_log_entries: u16::from(raw.elpe) + 1,
            power_states: raw.npss.saturating_add(1),
            warning_temperature_k: u16::from_le(raw.wctemp),
            critical_temperature_k: u16::from_le(raw.cctemp),
            total_capacity_bytes: le128(raw.tnvmcap),
            unallocated_capacity_bytes: le128(raw.unvmcap),
            namespaces: u32::from_le(raw.nn),
            write_cache: raw.vwc,
            atomic_write_blocks: u16::from_le(raw.awun),
            atomic_write_power_fail_blocks: u16::from_le(raw.awupf),
            sgls: u32::from_le(raw.sgls),
            subsystem_nqn: text(&bytes[768..1024]),
        }
    }

    /// MDTS in bytes; None: the controller sets no limit.
    pub fn max_transfer_bytes(&self) -> Option<u64> {
        match self.mdts {
            0 => None,
            // A power so large is no limit either.
            shift if shift > 40 => None,
            shift => Some(PAGE_MIN_BYTES << shift),
        }
    }

    /// It has a volatile write cache: what was written is durable only after a flush.
    pub fn has_write_cache(&self) -> bool {
        self.write_cache & 1 != 0
    }

    /// It knows Dataset Management, and with it deallocation (discard).
    pub fn can_deallocate(&self) -> bool {
        self.optional_nvm & (nvme_sys::NVME_CTRL_ONCS_DSM as u16) != 0
    }
}

/// One LBA format of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LbaFormat {
    /// Its index, what `nvme format --lbaf` takes.
    pub index: u8,
    /// Bytes per logical block; None: the format is not available (LBADS is 0 or reserved).
    pub lba_bytes: Option<u32>,
    /// log2 of that, as the drive gives it (LBADS).
    pub lba_shift: u8,
    /// Metadata bytes per block (MS).
    pub metadata_bytes: u16,
    /// Relative performance (RP): 0 best, 1 better, 2 good, 3 degraded.
    pub relative_performance: u8,
}

/// Identify Namespace, NVM command set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Its number.
    pub id: u32,
    /// Size (NSZE), logical blocks.
    pub size_blocks: u64,
    /// Capacity (NCAP), logical blocks that may be allocated.
    pub capacity_blocks: u64,
    /// Utilization (NUSE), logical blocks allocated.
    pub used_blocks: u64,
    /// Features (NSFEAT), bits.
    pub features: u8,
    /// Index of the format in use (from FLBAS).
    pub format_index: u8,
    /// Metadata follows each block's data, rather than being apart (FLBAS bit 4).
    pub metadata_inline: bool,
    /// End-to-end protection in use (DPS), bits; bits 2:0 not 0: protection information is on.
    pub protection: u8,
    /// All formats (LBAF, NLBAF + 1 of them).
    pub formats: Vec<LbaFormat>,
    /// Capacity of the NVM (NVMCAP), bytes; 0: not reported.
    pub nvm_capacity_bytes: u128,
    /// Optimal I/O boundary (NOIOB), logical blocks; 0: none.
    pub optimal_boundary_blocks: u16,
    /// Preferred write granularity (NPWG), logical blocks, 0's based.
    pub preferred_write_blocks: u16,
    /// Preferred write alignment (NPWA), logical blocks, 0's based.
    pub preferred_alignment_blocks: u16,
    /// Globally unique identifier (NGUID).
    pub nguid: [u8; 16],
    /// IEEE extended unique identifier (EUI64).
    pub eui64: [u8; 8],
}

impl Namespace {
    pub(crate) fn decode(id: u32, raw: &nvme_id_ns) -> Namespace {
        let count = (usize::from(raw.nlbaf) + 1).min(raw.lbaf.len());
        let format = |(index, format): (usize, &nvme_sys::nvme_lbaf)| LbaFormat {
            index: index as u8,
            lba_bytes: (9..32).contains(&format.ds).then(|| 1u32 << format.ds),
            lba_shift: format.ds,
            metadata_bytes: u16::from_le(format.ms),
            relative_performance: format.rp & 3,
        };
        Namespace {
            id,
            size_blocks: u64::from_le(raw.nsze),
            capacity_blocks: u64::from_le(raw.ncap),
            used_blocks: u64::from_le(raw.nuse),
            features: raw.nsfeat,
            format_index: lba_format_index(raw) as u8,
            metadata_inline: raw.flbas & 0x10 != 0,
            protection: raw.dps,
            formats: raw.lbaf[..count].iter().enumerate().map(format).collect(),
            nvm_capacity_bytes: le128(raw.nvmcap),
            optimal_boundary_blocks: u16::from_le(raw.noiob),
            preferred_write_blocks: u16::from_le(raw.npwg),
            preferred_alignment_blocks: u16::from_le(raw.npwa),
            nguid: raw.nguid,
            eui64: raw.eui64,
        }
    }

    /// The format in use; None when the drive names one that it does not have.
    pub fn format(&self) -> Option<&LbaFormat> {
        self.formats.get(usize::from(self.format_index))
    }

    /// Size in bytes; None when the format in use is none, or the product does not fit.
    pub fn size_bytes(&self) -> Option<u64> {
        self.size_blocks.checked_mul(u64::from(self.format()?.lba_bytes?))
    }
}

/// ASCII, padded with spaces (or, of names, with NUL). What is not printable becomes '?': it goes to terminals and JSON.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let printable = |byte: &u8| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '?' };
    bytes[..end].iter().map(printable).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_captured_controller_is_decoded_as_nvme_cli_does() {
        let raw = nvme_sys::from_bytes(include_bytes!("captured/id-ctrl.bin")).unwrap();
        let controller = Controller::decode(&raw);
        assert_eq!((controller.vendor_id, controller.subsystem_vendor_id), (6966, 6900));
        assert_eq!(controller.serial, "b");
        assert_eq!(controller.model, "QEMU NVMe Ctrl");
        assert_eq!(controller.firmware, "10.0.2");
        assert_eq!((controller.ieee, controller.controller_id), (5_395_456, 0));
        assert_eq!((controller.mdts, controller.max_transfer_bytes()), (7, Some(512 << 10)));
        assert_eq!(controller.version.to_string(), "1.4.0");
        assert_eq!((controller.warning_temperature_k, controller.critical_temperature_k), (343, 373));
        assert_eq!((controller.optional_admin, controller.optional_nvm), (298, 1885));
        assert_eq!((controller.namespaces, controller.write_cache, controller.sgls), (256, 7, 524_289));
        assert!(controller.has_write_cache() && controller.can_deallocate());
        assert_eq!(controller.subsystem_nqn, "nqn.2019-08.org.qemu:b");
        // 0's based in the page.
        assert_eq!((controller.error_log_entries, controller.power_states), (1, 1));
    }

    #[test]
    fn a_captured_namespace_is_decoded_as_nvme_cli_does() {
        let raw = nvme_sys::from_bytes(include_bytes!("captured/id-ns.bin")).unwrap();
        let namespace = Namespace::decode(1, &raw);
        let sizes = (namespace.size_blocks, namespace.capacity_blocks, namespace.used_blocks);
        assert_eq!(sizes, (65536, 65536, 65536));
        assert_eq!((namespace.features, namespace.format_index, namespace.metadata_inline), (52, 4, false));
        let formats: Vec<_> = namespace
            .formats
            .iter()
            .map(|f| (f.metadata_bytes, f.lba_bytes, f.relative_performance))
            .collect();
        let with = |lba: u32| [0, 8, 16, 64].map(|metadata: u16| (metadata, Some(lba), 0));
        assert_eq!(formats, [with(512), with(4096)].concat());
        assert_eq!(namespace.format().unwrap().lba_bytes, Some(4096));
        assert_eq!(namespace.size_bytes(), Some(256 << 20));
    }

    #[test]
    fn nonsense_of_a_drive_is_not_believed() {
        let mut page = vec![0xffu8; 4096];
        let controller = Controller::decode(&nvme_sys::from_bytes(&page).unwrap());
        assert_eq!(controller.max_transfer_bytes(), None);
        assert_eq!(controller.serial, "?".repeat(20));
        let namespace = Namespace::decode(1, &nvme_sys::from_bytes(&page).unwrap());
        assert_eq!((namespace.formats.len(), namespace.size_bytes()), (64, None));
        page.fill(0);
        let namespace = Namespace::decode(1, &nvme_sys::from_bytes(&page).unwrap());
        assert_eq!((namespace.formats[0].lba_bytes, namespace.size_bytes()), (None, None));
    }
}
