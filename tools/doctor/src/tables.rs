//! The tables of hardware, as data.

/// GPUs that aiDAPTIV's vendor published as validated.
const GPUS: &str = include_str!("../data/gpus.csv");
/// CPUs of the same publication.
pub(crate) const CPUS: &str = include_str!("../data/cpus.csv");
/// Drives, by their makers' data sheets.
pub(crate) const DRIVES: &str = include_str!("../data/drives.csv");
/// GPUs that nvtier ran on, and where the results are.
pub(crate) const RUN: &str = include_str!("../data/gpus_run.csv");

/// A GPU of the table. Empty where the table has nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuRow {
    /// `professional`, `consumer`, `laptop`.
    pub class: &'static str,
    /// As its vendor calls it.
    pub name: &'static str,
    /// Its generation.
    pub architecture: &'static str,
    /// Kind of memory.
    pub memory_type: &'static str,
    /// Bytes of memory, powers of 1000.
    pub memory_bytes: u64,
    /// Memory bandwidth, bytes a second.
    pub bandwidth: u64,
    /// Rate of matrix products in 16 bits as the table has it (with sparsity), 10^12 operations a second.
    pub fp16_tflops: Option<u32>,
    /// Streaming multiprocessors.
    pub multiprocessors: Option<u32>,
}

/// A CPU of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuRow {
    /// `Intel`, `AMD`.
    pub brand: &'static str,
    /// As its vendor calls it.
    pub model: &'static str,
    /// Cores of one.
    pub cores: u32,
    /// PCIe lanes.
    pub pcie_lanes: u32,
}

pub(crate) fn rows(text: &'static str) -> impl Iterator<Item = Vec<&'static str>> {
    text.lines().skip(1).filter(|line| !line.is_empty()).map(|line| line.split(',').collect())
}

fn giga(text: &str) -> u64 {
    text.split(' ').next().and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) * 1_000_000_000
}

/// GPUs that are known.
pub fn gpus() -> Vec<GpuRow> {
    rows(GPUS)
        .map(|row| GpuRow {
            class: row[0],
            name: row[1],
            architecture: row[2],
            memory_type: row[3],
            memory_bytes: giga(row[4]),
            bandwidth: giga(row[5]),
            fp16_tflops: row[6].parse().ok(),
            multiprocessors: row[7].parse().ok(),
        })
        .collect()
}

/// CPUs that are known.
pub fn cpus() -> Vec<CpuRow> {
    rows(CPUS)
        .map(|row| CpuRow {
            brand: row[0],
            model: row[1],
            cores: row[3].parse().unwrap_or(0),
            pcie_lanes: row[5].parse().unwrap_or(0),
        })
        .collect()
}

/// The row whose name is the longest that `found` contains, word by word.
pub fn gpu(found: &str) -> Option<GpuRow> {
    best(found, gpus(), |row| row.name)
}

/// Whether nvtier ran on a GPU of this very name.
pub(crate) fn ran_on(found: &str) -> bool {
    rows(RUN).any(|row| words(row[0]) == words(found))
}

pub(crate) fn cpu(found: &str) -> Option<CpuRow> {
    best(found, cpus(), |row| row.model)
}

/// Bytes that a drive's maker rates it for. `model`: as the drive says, which begins with the name of the line. `bytes`: its length.
pub(crate) fn rated_bytes(model: &str, bytes: u64) -> Option<u64> {
    let line = rows(DRIVES)
        .filter(|row| model.strip_prefix(row[0]).is_some_and(|rest| rest.is_empty() || rest.starts_with(' ')))
        .filter_map(|row| Some((row[0], row[1].parse::<u64>().ok()?, row[2].parse::<u64>().ok()?)));
    let lines: Vec<_> = line.collect();
    // `980 PRO` begins with `980`, too.
    let longest = lines.iter().map(|(name, ..)| name.len()).max()?;
    // A drive of 2 TB has 2 000 398 934 016 bytes.
    let fits = |gigabytes: u64| (bytes / 1_000_000_000).abs_diff(gigabytes) <= gigabytes / 20;
    lines
        .iter()
        .find(|(name, gigabytes, _)| name.len() == longest && fits(*gigabytes))
        .map(|(_, _, terabytes)| terabytes * 1_000_000_000_000)
}

fn words(name: &str) -> Vec<String> {
    let clean = name.replace("(R)", " ").replace("(TM)", " ").to_lowercase();
    clean
        .split(|c: char| !c.is_alphanumeric() && c != '+')
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

fn best<T>(found: &str, rows: Vec<T>, name: impl Fn(&T) -> &'static str) -> Option<T> {
    let found = words(found);
    let fits = |row: &T| {
        // What the vendor leaves out now and then.
        let wanted: Vec<String> = words(name(row))
            .into_iter()
            .filter(|word| !["nvidia", "geforce", "generation", "gpu", "core"].contains(&word.as_str()))
            .collect();
        wanted.iter().all(|word| found.contains(word)).then_some(wanted.len())
    };
    rows.into_iter()
        .filter_map(|row| fits(&row).map(|words| (words, row)))
        .max_by_key(|(words, _)| *words)
        .map(|(_, row)| row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_whole() {
        assert_eq!((gpus().len(), cpus().len()), (28, 12));
        assert!(gpus().iter().all(|row| row.memory_bytes >= 16_000_000_000 && row.bandwidth > 0));
        assert!(cpus().iter().all(|row| row.pcie_lanes >= 20));
    }

    #[test]
    fn ratings_are_of_the_line_and_the_size() {
        let terabytes = |model, bytes| rated_bytes(model, bytes).map(|rated| rated / 1_000_000_000_000);
        assert_eq!(terabytes("Samsung SSD 990 PRO 2TB", 2_000_398_934_016), Some(1200));
        assert_eq!(terabytes("Samsung SSD 980 PRO 2TB", 2_000_398_934_016), Some(1200));
        assert_eq!(terabytes("Samsung SSD 980 2TB", 2_000_398_934_016), None, "there is none of that size");
        assert_eq!(terabytes("Samsung SSD 970 EVO Plus 250GB", 250_059_350_016), Some(150));
        assert_eq!(terabytes("WD_BLACK SN850X 4000GB", 4_000_787_030_016), Some(2400));
        assert_eq!(terabytes("Samsung SSD 9800", 1_000_204_886_016), None);
        assert_eq!(terabytes("", 1_000_204_886_016), None);
    }

    #[test]
    fn names_as_drivers_write_them_are_found() {
        for (driver, table) in [
            ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
            ("NVIDIA GeForce RTX 4090 D", "GeForce RTX 4090 D"),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 Laptop GPU"),
            ("NVIDIA GeForce RTX 4080 SUPER", "GeForce RTX 4080 Super"),
            ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
            ("NVIDIA RTX A6000", "NVIDIA RTX A6000"),
            ("NVIDIA L40S", "NVIDIA L40S"),
        ] {
            assert_eq!(gpu(driver).map(|row| row.name), Some(table), "{driver}");
        }
        assert_eq!(gpu("NVIDIA GeForce GTX 1080"), None);
        assert_eq!(cpu("Intel(R) Xeon(R) Gold 6538Y+").map(|row| row.pcie_lanes), Some(80));
        assert_eq!(cpu("13th Gen Intel(R) Core(TM) i9-13900").map(|row| row.pcie_lanes), Some(20));
        assert_eq!(cpu("AMD EPYC 7713P 64-Core Processor").map(|row| row.pcie_lanes), Some(128));
    }
}
