//! What pool a workload runs on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use engine::{FormatOptions, OpenOptions, Pool};
use nvme::{Device, SimDevice, SimHook, SimImage, SimOptions, SimPower, SimRng};

/// Members, blocks and chunks of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// Members, 1 to 16.
    pub members: usize,
    /// Block size of their devices, bytes.
    pub lba: u32,
    /// Bytes under one checksum.
    pub chunk: u32,
    /// Bytes on one member before the next one's turn.
    pub stripe: u64,
    /// Bytes for data on each member.
    pub data: u64,
    /// Budget of the RAM tier, bytes.
    pub ram: u64,
}

/// Head, catalog zone of member 0, and the block at the end.
const HEAD: u64 = 1 << 20;
const ZONE: u64 = 16 << 20;
const TAIL: u64 = 4096;

impl Config {
    /// One member, small chunks, room for a few megabytes.
    pub const SMALL: Config =
        Config { members: 1, lba: 512, chunk: 4096, stripe: 16 << 10, data: 2 << 20, ram: 0 };

    /// By chance.
    pub fn draw(rng: &mut SimRng) -> Config {
        let mut of = |list: &[u64]| list[rng.in_range(0..list.len() as u64) as usize];
        let chunk = of(&[4096, 4096, 16 << 10]);
        Config {
            members: of(&[1, 1, 2, 3, 4]) as usize,
            lba: of(&[512, 4096]) as u32,
            chunk: chunk as u32,
            stripe: chunk * of(&[1, 4]),
            // The smallest members are full soon.
            data: of(&[1 << 20, 1 << 20, 4 << 20]),
            ram: of(&[0, 0, 1 << 20]),
        }
    }

    /// Bytes that all regions together can have.
    pub fn capacity(&self) -> u64 {
        self.members as u64 * self.data
    }

    /// How its pools are opened: no snapshots but those that are asked for.
    pub fn open_options(&self) -> OpenOptions {
        // Every other kind of pool has its catalog treated as a large one: no check of all pages at open, and commits that need none.
        let large = self.lba == 512;
        OpenOptions {
            commit_interval_ms: 0,
            ram_bytes: self.ram,
            catalog_check_bytes: if large { 0 } else { OpenOptions::default().catalog_check_bytes },
            ..OpenOptions::default()
        }
    }

    /// How its pools are made.
    pub fn format_options(&self) -> FormatOptions {
        FormatOptions { chunk_size: self.chunk, stripe_unit: self.stripe, ..FormatOptions::default() }
    }

    /// Empty devices.
    pub fn blank(&self) -> Vec<SimImage> {
        (0..self.members)
            .map(|index| {
                let len = HEAD + if index == 0 { ZONE } else { 0 } + self.data + TAIL;
                SimDevice::new(len, SimOptions { lba_size: self.lba, ..SimOptions::default() })
                    .expect("lengths are whole blocks")
                    .image()
            })
            .collect()
    }

    /// A new pool of this kind. Made once, then copied.
    ///
    /// # Panics
    /// When it cannot be formatted.
    pub fn formatted(&self) -> Vec<SimImage> {
        static MADE: Mutex<Option<HashMap<Config, Vec<SimImage>>>> = Mutex::new(None);
        let key = Config { ram: 0, ..*self };
        if let Some(made) =
            MADE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().get(&key)
        {
            return made.clone();
        }
        let machine = Machine::new(self, &self.blank(), None);
        Pool::format_devices(&machine.as_devices(), &self.format_options()).expect("format a new pool");
        let images = machine.images();
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        made.get_or_insert_default().entry(key).or_insert(images).clone()
    }
}

/// The devices of a pool, on one power supply.
#[derive(Debug)]
pub struct Machine {
    /// The kind of pool on them.
    pub config: Config,
    /// In order of the members.
    pub devices: Vec<Arc<SimDevice>>,
    /// Of all of them.
    pub power: Arc<SimPower>,
}

impl Machine {
    /// Devices with volatile caches that hold what `images` do.
    ///
    /// # Panics
    /// When an image is not of whole blocks.
    pub fn new(config: &Config, images: &[SimImage], hook: Option<Arc<dyn SimHook>>) -> Machine {
        let power = Arc::new(SimPower::new());
        let device = |(index, image): (usize, &SimImage)| {
            let options = SimOptions {
                seed: index as u64,
                lba_size: config.lba,
                name: Some(format!("sim{index}")),
                volatile_cache: true,
                power: Some(power.clone()),
                hook: hook.clone(),
                ..SimOptions::default()
            };
            Arc::new(SimDevice::from_image(image, options).expect("an image of a device of this kind"))
        };
        let devices = images.iter().enumerate().map(device).collect();
        Machine { config: *config, devices, power }
    }

    /// As the engine takes them.
    pub fn as_devices(&self) -> Vec<Arc<dyn Device>> {
        self.devices.iter().map(|device| device.clone() as Arc<dyn Device>).collect()
    }

    /// What reads see.
    pub fn images(&self) -> Vec<SimImage> {
        self.devices.iter().map(|device| device.image()).collect()
    }

    /// What is there when the power comes back, by chance.
    pub fn survivors(&self, seed: u64) -> Vec<SimImage> {
        let mut rng = SimRng::new(seed);
        self.devices.iter().map(|device| device.survivors(nvme::Survivors::Random(rng.next_u64()))).collect()
    }
}
