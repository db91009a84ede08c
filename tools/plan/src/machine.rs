//! The machine that is planned for: what it has, and how fast each part is, with where each figure comes from.

use doctor::GpuRow;
use serde::Serialize;

/// Where a figure comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// On this machine, by `nvtier doctor --measure`.
    Measured,
    /// On the command line.
    Given,
    /// In the table of GPUs.
    Table,
    /// What such parts are usually rated for; not measured.
    Nominal,
}

/// A figure, and where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// Bytes a second, operations a second, bytes.
    pub value: f64,
    /// Where it comes from.
    pub origin: Origin,
}

impl Figure {
    /// A figure of this origin.
    pub fn new(value: f64, origin: Origin) -> Figure {
        Figure { value, origin }
    }
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Bytes of its memory that can be used.
    pub memory_bytes: u64,
    /// Reads of its own memory, bytes a second.
    pub bandwidth: Option<Figure>,
    /// Operations a second of matrix products in 16 bits that are reached, not the peak.
    pub flops: Option<Figure>,
    /// Host to device, bytes a second.
    pub htod: Figure,
    /// Device to host, bytes a second.
    pub dtoh: Figure,
}

/// Share of the peak that matrix products are assumed to reach.
pub const EFFICIENCY: f64 = 0.6;

impl Gpu {
    /// A GPU of the table.
    pub fn of_row(row: &GpuRow) -> Gpu {
        let link = match row.architecture {
            "Hopper" | "Blackwell" => 53e9,
            _ => 25e9,
        };
        Gpu {
            name: row.name.to_owned(),
            memory_bytes: row.memory_bytes,
            bandwidth: Some(Figure::new(row.bandwidth as f64, Origin::Table)),
            flops: dense_flops(row).map(|peak| Figure::new(peak * EFFICIENCY, Origin::Table)),
            htod: Figure::new(link, Origin::Nominal),
            dtoh: Figure::new(link, Origin::Nominal),
        }
    }
}

/// Peak of dense products with sums in 32 bits. The table's column is with sparsity, which doubles it (`seed::gpu_rows` shows that for
/// each row); GeForce and laptop GPUs add up in 32 bits at half the rate.
pub fn dense_flops(row: &GpuRow) -> Option<f64> {
    let table = f64::from(row.fp16_tflops?) * 1e12;
    Some(if row.class == "professional" { table / 2.0 } else { table / 4.0 })
}

/// A drive.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Drive {
    /// What it is.
    pub name: String,
    /// Bytes.
    pub capacity_bytes: u64,
    /// Bytes a second.
    pub read: Figure,
    /// Bytes a second.
    pub write: Figure,
    /// Bytes that may be written to it in its life.
    pub rated_bytes: Figure,
}

/// Bytes that a consumer drive is usually rated for, for each byte of capacity: 600 TB for 1 TB.
const RATED_PER_BYTE: f64 = 600.0;

/// What drives of a PCIe generation with four lanes are usually rated for: reads and writes, bytes a second.
pub const CLASSES: [(&str, f64, f64); 3] =
    [("gen3", 3.5e9, 3.0e9), ("gen4", 7.0e9, 5.0e9), ("gen5", 14.0e9, 10.0e9)];

impl Drive {
    /// A drive of a class: `gen3`, `gen4`, `gen5`.
    pub fn of_class(class: &str, capacity_bytes: u64) -> Option<Drive> {
        let (name, read, write) = CLASSES.into_iter().find(|(name, ..)| *name == class)?;
        Some(Drive {
            name: format!("{name} drive"),
            capacity_bytes,
            read: Figure::new(read, Origin::Nominal),
            write: Figure::new(write, Origin::Nominal),
            rated_bytes: Drive::usual_rating(capacity_bytes),
        })
    }

    /// What such a drive is usually rated for.
    pub fn usual_rating(capacity_bytes: u64) -> Figure {
        Figure::new(capacity_bytes as f64 * RATED_PER_BYTE, Origin::Nominal)
    }
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Its GPU, where it has one.
    pub gpu: Option<Gpu>,
    /// Bytes.
    pub ram_bytes: u64,
    /// Copies in host memory, bytes a second.
    pub ram_copy: Figure,
    /// Drives of the pool: striped, so their rates add up.
    pub drives: Vec<Drive>,
}

impl Machine {
    /// All drives together, or those of the link where that is less: bytes a second from drive to device.
    pub fn read(&self) -> f64 {
        self.drives.iter().map(|drive| drive.read.value).sum()
    }

    /// Writes likewise.
    pub fn write(&self) -> f64 {
        self.drives.iter().map(|drive| drive.write.value).sum()
    }

    /// Bytes on all drives.
    pub fn capacity(&self) -> u64 {
        self.drives.iter().map(|drive| drive.capacity_bytes).fold(0, u64::saturating_add)
    }

    /// Bytes that may be written to all drives in their lives.
    pub fn rated(&self) -> f64 {
        self.drives.iter().map(|drive| drive.rated_bytes.value).sum()
    }

    /// Memory that is left to tiers when the system, the framework and the data loader have theirs.
    pub fn ram_for_tiers(&self, training: bool) -> u64 {
        let reserve = if training {
            24_000_000_000.min(self.ram_bytes / 2)
        } else {
            8_000_000_000.min(self.ram_bytes / 4)
        };
        self.ram_bytes - reserve
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_becomes_gpus() {
        let row = doctor::gpus().into_iter().find(|row| row.name == "GeForce RTX 4090").unwrap();
        let gpu = Gpu::of_row(&row);
        assert_eq!(gpu.memory_bytes, 24_000_000_000);
        let flops = gpu.flops.unwrap().value;
        assert!((flops - 0.6 * 661e12 / 4.0).abs() < 1e6, "{flops}");
        let unknown = doctor::gpus().into_iter().find(|row| row.name == "NVIDIA L40S").unwrap();
        assert_eq!(Gpu::of_row(&unknown).flops, None);
        assert_eq!(Drive::of_class("gen4", 1).map(|drive| drive.read.value), Some(7e9));
        assert_eq!(Drive::of_class("gen9", 1), None);
    }
}
