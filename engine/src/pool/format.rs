//! Making a pool.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nvme::{Device, DeviceOptions};

use super::live::Live;
use super::{FormatOptions, MAX_CHUNK_SIZE, MAX_MEMBERS, MIN_CHUNK_SIZE, MemberKind, PoolInfo};
use crate::catalog::store::{CATALOG_FILE, COPY_FILE, CatalogStore, RESERVE_FILE};
use crate::catalog::{Batch, Meta};
use crate::error::{Error, ErrorKind, Result};
use crate::format::place::Place;
use crate::format::{self, MemberEntry, POINTER, SUPERBLOCK_FILE, Superblock, foreign};
use crate::member::directory::{LOST, REGIONS, space};
use crate::member::extent_files;
use crate::member::raw::RawGeometry;
use crate::namespace::Tree;
use crate::namespace::record::encode_node;
use crate::owner::{OWNER_FILE, Owner};
use crate::types::{ROOT, Timestamp};

/// Least bytes of a directory member: its quota and what its file system has.
pub const MIN_DIRECTORY_BYTES: u64 = 4 << 20;

/// What has to be undone when a later step fails.
#[derive(Debug, Default)]
struct Made {
    directories: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Made {
    fn undo(self) {
        for file in self.files {
            let _ = fs::remove_file(file);
        }
        for directory in self.directories {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

fn invalid(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, context)
}

fn check(options: &FormatOptions) -> Result<()> {
    let chunk = options.chunk_size;
    if !chunk.is_power_of_two() || !(MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&chunk) {
        return Err(invalid(format!(
            "a chunk size of {chunk} bytes: it has to be a power of two from {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE}"
        )));
    }
    let stripe = options.stripe_unit;
    if stripe == 0 || !stripe.is_multiple_of(chunk as u64) {
        return Err(invalid(format!(
            "a stripe unit of {stripe} bytes: it has to be a multiple of the chunk size, {chunk}"
        )));
    }
    if options.members.len() > MAX_MEMBERS {
        return Err(invalid(format!(
            "{} members; at most {MAX_MEMBERS} are possible",
            options.members.len()
        )));
    }
    Ok(())
}

/// What a member path is, or will be.
fn kind_of(path: &Path, options: &FormatOptions) -> Result<MemberKind> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Ok(MemberKind::Directory),
        Ok(meta) if meta.is_file() => Ok(MemberKind::Image),
        Ok(meta) if meta.file_type().is_block_device() || nvme::passthrough::is_nvme_char(path) => {
            Ok(MemberKind::Block)
        }
        Ok(_) => Err(invalid(format!(
            "{} is neither a directory, a block device, an NVMe namespace nor a regular file",
            path.display()
        ))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(if options.raw { MemberKind::Image } else { MemberKind::Directory })
        }
        Err(error) => Err(Error::io(format!("look at {}", path.display()), error)),
    }
}

fn refuse_foreign(path: &Path, kind: MemberKind, options: &FormatOptions) -> Result<()> {
    let found = match kind {
        MemberKind::Directory => foreign::in_directory(path)?,
        _ => foreign::in_device(path)?,
    };
    match found {
        Some(found) if !options.force => Err(Error::new(
            ErrorKind::ForeignData,
            format!(
                "{} holds {found}: it would be lost; format with --force if that is right",
                path.display()
            ),
        )),
        _ => Ok(()),
    }
}

/// Makes a pool's directory, which is closed to others, and those above it, which are as the umask says.
fn make_directory(path: &Path) -> std::io::Result<()> {
    if let Some(above) = path.parent() {
        fs::create_dir_all(above)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made,
    }
}

/// Makes what does not exist yet, and refuses what must not be formatted. Returns its absolute path.
fn prepare(path: &Path, kind: MemberKind, options: &FormatOptions, made: &mut Made) -> Result<PathBuf> {
    let what = |verb: &str| format!("{verb} {}", path.display());
    if !path.exists() {
        if kind == MemberKind::Directory {
            let first =
                path.ancestors().take_while(|above| !above.exists() && !above.as_os_str().is_empty()).last();
            make_directory(path).map_err(|error| Error::io(what("make directory"), error))?;
            made.directories.push(first.unwrap_or(path).to_path_buf());
        } else {
            let Some(size) = options.size else {
                return Err(invalid(format!(
                    "{} does not exist: say how large the image is to be (--size)",
                    path.display()
                )));
            };
            RawGeometry::plan(size, options.chunk_size, true)?;
            nvme::FileDevice::create(path, size, &DeviceOptions::default()).map_err(|error| {
                let _ = fs::remove_file(path);
                Error::from(error).context(what("make image"))
            })?;
            made.files.push(path.to_path_buf());
        }
    } else {
        // Before looking closer, so that a running owner is what the message names.
        if let Some(pid) = Owner::pid(path, kind) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{} is in use by process {pid}", path.display()),
            ));
        }
        refuse_foreign(path, kind, options)?;
        if kind == MemberKind::Image
            && let Some(size) = options.size
        {
            let device = nvme::FileDevice::open(path, &DeviceOptions::default()).map_err(Error::from)?;
            device.allocate(size).map_err(|error| Error::from(error).context(what("extend image")))?;
        }
    }
    fs::canonicalize(path).map_err(|error| Error::io(what("look at"), error))
}

/// Data bytes of a member, or `TooSmall`.
fn measure(
    path: &Path,
    kind: MemberKind,
    index: u16,
    quota: u64,
    options: &FormatOptions,
) -> Result<(u64, RawGeometry)> {
    let none = RawGeometry { zone_offset: 0, zone_len: 0, data_offset: 0, data_len: quota };
    if kind == MemberKind::Directory {
        let free = space(path)?.free_bytes;
        let too_small = |what: &str, bytes: u64| {
            Error::new(
                ErrorKind::TooSmall,
                format!(
                    "{}: {what} {bytes} bytes, a member needs at least {MIN_DIRECTORY_BYTES}",
                    path.display()
                ),
            )
        };
        if free < MIN_DIRECTORY_BYTES {
            return Err(too_small("its file system has", free));
        }
        if options.size.is_some() && quota < MIN_DIRECTORY_BYTES {
            return Err(too_small("its share of the size is", quota));
        }
        return Ok((quota, none));
    }
    let read = || Place::open(path, false)?.len();
    let len = read().map_err(|error| Error::io(format!("measure {}", path.display()), error))?;
    let geometry = RawGeometry::plan(len, options.chunk_size, index == 0)
        .map_err(|error| error.context(path.display()))?;
    Ok((geometry.data_len, geometry))
}

/// Removes what an earlier pool left in a directory. Other files stay.
fn clear_directory(path: &Path) -> Result<()> {
    // The superblock first: from here on it is no pool, whatever happens.
    for name in [
        SUPERBLOCK_FILE,
        CATALOG_FILE,
        COPY_FILE,
        "catalog.damaged",
        "catalog.trial",
        "catalog.bak.new",
        RESERVE_FILE,
        OWNER_FILE,
    ] {
        let file = path.join(name);
        match fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", file.display()), error));
            }
            _ => {}
        }
    }
    for name in [REGIONS, LOST, extent_files::DIRECTORY] {
        let directory = path.join(name);
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", directory.display()), error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The first snapshot: a root.
pub(super) fn first_batch(pool: [u8; 16], now: Timestamp) -> Batch {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let tree: Tree<Live> = Tree::new(uid, gid, now);
    let meta = Meta { pool, next_node: tree.next_node(), next_file: 1, generation: 1, saved: now.secs };
    let mut batch = Batch::new(meta);
    if let Ok(root) = tree.get(ROOT) {
        batch.nodes.push((ROOT, encode_node(ROOT, root)));
    }
    batch
}

pub(super) fn format(path: &Path, options: &FormatOptions) -> Result<PoolInfo> {
    check(options)?;
    let mut made = Made::default();
    match format_members(path, options, &mut made) {
        Ok(()) => super::open::probe(path),
        Err(error) => {
            made.undo();
            Err(error.context(format!("format {}", path.display())))
        }
    }
}

fn format_members(path: &Path, options: &FormatOptions, made: &mut Made) -> Result<()> {
    let given = if options.members.is_empty() { vec![path.to_path_buf()] } else { options.members.clone() };
    let mut members: Vec<(PathBuf, MemberKind)> = Vec::new();
    for member in &given {
        let kind = kind_of(member, options)?;
        let member = prepare(member, kind, options, made)?;
        if members.iter().any(|(other, _)| *other == member) {
            return Err(invalid(format!("{} is given twice", member.display())));
        }
        if let Some((other, _)) =
            members.iter().find(|(other, _)| other.starts_with(&member) || member.starts_with(other))
        {
            return Err(invalid(format!(
                "members {} and {} lie within each other",
                member.display(),
                other.display()
            )));
        }
        members.push((member, kind));
    }
    let here = fs::canonicalize(path).ok();
    let pointer = !members.iter().any(|(member, _)| Some(member) == here.as_ref());
    if pointer {
        match fs::metadata(path) {
            Ok(meta) if !meta.is_dir() => {
                return Err(invalid(format!(
                    "{}: a pool with members of its own is named by a directory",
                    path.display()
                )));
            }
            Ok(_) => refuse_foreign_pointer(path, &members, options)?,
            Err(_) => {
                make_directory(path)
                    .map_err(|error| Error::io(format!("make directory {}", path.display()), error))?;
                made.directories.push(path.to_path_buf());
            }
        }
    }
    let directories = members.iter().filter(|(_, kind)| *kind == MemberKind::Directory).count() as u64;
    let quota = options.size.map_or(0, |size| size / directories.max(1));
    let now = Timestamp::now();
    let pool = options.id.unwrap_or_else(|| *uuid::Uuid::new_v4().as_bytes());
    let mut geometries = Vec::new();
    let mut table = Vec::new();
    for (index, (member, kind)) in members.iter().enumerate() {
        let (bytes, geometry) = measure(member, *kind, index as u16, quota, options)?;
        geometries.push(geometry);
        table.push(MemberEntry {
            id: *uuid::Uuid::new_v4().as_bytes(),
            kind: *kind,
            bytes,
            path: member.clone(),
        });
    }
    let superblock = |index: u16, geometry: RawGeometry| Superblock {
        pool,
        index,
        chunk_size: options.chunk_size,
        stripe_unit: options.stripe_unit,
        created: now.secs,
        sequence: 1,
        catalog_offset: geometry.zone_offset,
        catalog_len: geometry.zone_len,
        data_offset: geometry.data_offset,
        data_len: geometry.data_len,
        members: table.clone(),
        own_path: PathBuf::new(),
    };
    superblock(0, geometries[0]).encode()?; // whether the paths fit is known before anything is lost
    for (member, kind) in &members {
        match kind {
            MemberKind::Directory => clear_directory(member)?,
            _ => wipe(member)?,
        }
    }
    for ((member, kind), geometry) in members.iter().zip(&geometries) {
        if *kind == MemberKind::Image {
            // A sparse image promises room that its file system may not have when it is wanted. Data can wait; the catalog must go on.
            let device = nvme::FileDevice::open(member, &DeviceOptions::default()).map_err(Error::from)?;
            let reserved = device.allocate(geometry.data_offset);
            reserved.map_err(|error| Error::from(error).context("reserve the catalog's space"))?;
        }
    }
    // The catalog before the superblocks: a pool that looks like one is one.
    let device = match members[0].1 {
        MemberKind::Directory => None,
        _ => Some(nvme::open(&members[0].0, &DeviceOptions::default()).map_err(Error::from)?),
    };
    let store = CatalogStore::new(&members[0].0, device, &geometries[0]);
    store.create(&first_batch(pool, now))?.close()?;
    store.back_up()?;
    drop(store);
    for (index, ((member, kind), geometry)) in members.iter().zip(&geometries).enumerate() {
        format::write(member, *kind, &superblock(index as u16, *geometry))?;
    }
    if pointer {
        let none = RawGeometry { zone_offset: 0, zone_len: 0, data_offset: 0, data_len: 0 };
        let own_path = fs::canonicalize(path)
            .map_err(|error| Error::io(format!("look at {}", path.display()), error))?;
        format::write(path, MemberKind::Directory, &Superblock { own_path, ..superblock(POINTER, none) })?;
    }
    Ok(())
}

/// See [`Pool::format_devices`](super::Pool::format_devices).
pub(super) fn format_devices(devices: &[Arc<dyn Device>], options: &FormatOptions) -> Result<PoolInfo> {
    check(options)?;
    if devices.is_empty() || devices.len() > MAX_MEMBERS {
        return Err(invalid(format!("{} devices; a pool has 1 to {MAX_MEMBERS} members", devices.len())));
    }
    let now = Timestamp::now();
    let pool = options.id.unwrap_or_else(|| *uuid::Uuid::new_v4().as_bytes());
    let mut geometries = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let geometry = RawGeometry::plan(device.len(), options.chunk_size, index == 0)
            .map_err(|error| error.context(device.name()))?;
        geometries.push(geometry);
    }
    let entry = |(device, geometry): (&Arc<dyn Device>, &RawGeometry)| MemberEntry {
        id: *uuid::Uuid::new_v4().as_bytes(),
        kind: MemberKind::Image,
        bytes: geometry.data_len,
        path: PathBuf::from(device.name()),
    };
    let table: Vec<MemberEntry> = devices.iter().zip(&geometries).map(entry).collect();
    let superblock = |index: usize| Superblock {
        pool,
        index: index as u16,
        chunk_size: options.chunk_size,
        stripe_unit: options.stripe_unit,
        created: now.secs,
        sequence: 1,
        catalog_offset: geometries[index].zone_offset,
        catalog_len: geometries[index].zone_len,
        data_offset: geometries[index].data_offset,
        data_len: geometries[index].data_len,
        members: table.clone(),
        own_path: PathBuf::new(),
    };
    superblock(0).encode()?; // whether the names fit is known before anything is lost
    for device in devices {
        format::erase_device(&**device)?;
    }
    let store = CatalogStore::new(Path::new(devices[0].name()), Some(devices[0].clone()), &geometries[0]);
    store.create(&first_batch(pool, now))?.close()?;
    store.back_up()?;
    // Member 0 last: a pool that has all its members is whole.
    for (index, device) in devices.iter().enumerate().rev() {
        format::write_device(&**device, &superblock(index))?;
    }
    super::open::probe_devices(devices)
}

/// The directory that only points to the members may hold them.
fn refuse_foreign_pointer(
    path: &Path,
    members: &[(PathBuf, MemberKind)],
    options: &FormatOptions,
) -> Result<()> {
    let here =
        fs::canonicalize(path).map_err(|error| Error::io(format!("look at {}", path.display()), error))?;
    let listed = fs::read_dir(&here).map_err(|error| Error::io(format!("list {}", path.display()), error))?;
    let other = listed.filter_map(|entry| entry.ok().map(|entry| entry.path())).find(|entry| {
        !entry.ends_with("lost+found") && !members.iter().any(|(member, _)| member.starts_with(entry))
    });
    match other {
        Some(_) => refuse_foreign(&here, MemberKind::Directory, options),
        None => Ok(()),
    }
}

/// Overwrites the superblocks of whatever was on a raw member.
fn wipe(path: &Path) -> Result<()> {
    let run = || -> std::io::Result<()> {
        let mut place = Place::open(path, true)?;
        let len = place.len()?;
        let zeros = vec![0u8; 128 << 10];
        let part = zeros.len() as u64;
        place.write_all_at(&zeros[..part.min(len) as usize], 0)?;
        let tail = len.saturating_sub(part);
        place.write_all_at(&zeros[..(len - tail) as usize], tail)?;
        place.sync()
    };
    run().map_err(|error| Error::io(format!("wipe {}", path.display()), error))
}
