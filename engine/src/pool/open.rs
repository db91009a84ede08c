//! Opening a pool: find its members, take ownership, read the catalog, clear away what a crash left.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, OnceLock, RwLock};

use nvme::{Device, DeviceOptions};

use super::commit::FILE_RESERVE;
use super::live::Live;
use super::{
    DeviceHook, Inner, MemberInfo, MemberKind, OpenOptions, Pool, PoolCounters, PoolInfo, Shared, Storage,
    Verify, commit, lock,
};
use crate::catalog::store::{CatalogStore, How, Loaded};
use crate::catalog::{Batch, Clock};
use crate::error::{Error, ErrorKind, Result};
use crate::extent_io::{ExtentIo, ExtentIoOptions};
use crate::format::{self, Found, POINTER, Superblock, uuid_text};
use crate::layout::Extent;
use crate::member::Member;
use crate::member::directory::{FileDirectory, allocated, space};
use crate::member::extent_files::{ExtentDirectory, ExtentDirectoryOptions};
use crate::member::raw::{RawGeometry, RawMember};
use crate::namespace::Tree;
use crate::owner::Owner;
use crate::prefetch::Prefetcher;
use crate::types::{ROOT, Timestamp};

/// A member that was found.
#[derive(Debug)]
struct Located {
    path: PathBuf,
    kind: MemberKind,
    found: Found,
}

fn kind_at(path: &Path) -> Result<MemberKind> {
    let meta =
        fs::metadata(path).map_err(|error| Error::io(format!("open pool {}", path.display()), error))?;
    if meta.is_dir() {
        Ok(MemberKind::Directory)
    } else if meta.file_type().is_block_device() || nvme::passthrough::is_nvme_char(path) {
        Ok(MemberKind::Block)
    } else if meta.is_file() {
        Ok(MemberKind::Image)
    } else if nvme::passthrough::is_controller(path) {
        Err(Error::new(
            ErrorKind::NotAPool,
            format!("{} is an NVMe controller: name one of its namespaces", path.display()),
        ))
    } else {
        Err(Error::new(ErrorKind::NotAPool, format!("{} is not a pool", path.display())))
    }
}

/// Finds all members from the path of one of them, or of the directory that points to them.
fn locate(path: &Path, hook: Option<&DeviceHook>) -> Result<(Superblock, Vec<Located>)> {
    let kind = kind_at(path)?;
    let first = format::read_through(path, kind, hook)?;
    let here =
        fs::canonicalize(path).map_err(|error| Error::io(format!("open pool {}", path.display()), error))?;
    let superblock = first.superblock.clone();
    let mut first = Some(first);
    // Where this one was moved to tells where the others may have been moved to.
    let was = match superblock.index {
        POINTER => &superblock.own_path,
        index => &superblock.members[index as usize].path,
    };
    let moved = if *was == here { None } else { relocation(was, &here) };
    let mut members = Vec::new();
    for (index, entry) in superblock.members.iter().enumerate() {
        if superblock.index as usize == index
            && let Some(found) = first.take()
        {
            members.push(Located { path: here.clone(), kind, found });
            continue;
        }
        let beside = moved.as_ref().and_then(|(from, to)| Some(to.join(entry.path.strip_prefix(from).ok()?)));
        let mut candidates = Vec::from_iter(beside.filter(|beside| *beside != entry.path && beside.exists()));
        candidates.push(entry.path.clone());
        let mut result = Err(missing(&superblock, index, "it is not there"));
        for candidate in candidates {
            result = member_at(&superblock, index, candidate, hook);
            if result.is_ok() {
                break;
            }
        }
        if result.is_err()
            && let Some(found) = on_other_namespace(&superblock, index, hook)
        {
            result = Ok(found);
        }
        members.push(result?);
    }
    Ok((superblock, members))
}

/// A member on an NVMe namespace under another name: the kernel numbers controllers in the order in which they answer, which
/// may be another one at each boot, and a drive that was plugged in again gets a new number.
fn on_other_namespace(pool: &Superblock, index: usize, hook: Option<&DeviceHook>) -> Option<Located> {
    let was = pool.members[index].path.file_name()?.to_str()?;
    let prefix = ["nvme", "ng"].into_iter().find(|prefix| was.starts_with(prefix))?;
    let alike = nvme::passthrough::namespace_nodes().into_iter().filter(|node| {
        node.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
    });
    let found = alike.filter_map(|node| member_at(pool, index, node, hook).ok()).next()?;
    tracing::info!(was = %pool.members[index].path.display(), is = %found.path.display(), "a member has another name now");
    Some(found)
}

/// The differing starts of two paths that end alike.
fn relocation(was: &Path, is: &Path) -> Option<(PathBuf, PathBuf)> {
    let (mut was, mut is) = (was, is);
    while was.file_name().is_some() && was.file_name() == is.file_name() {
        (was, is) = (was.parent()?, is.parent()?);
    }
    // At least the directory that holds both.
    Some((was.to_path_buf(), is.to_path_buf()))
}

fn missing(pool: &Superblock, index: usize, why: &str) -> Error {
    let path = pool.members[index].path.display();
    Error::new(
        ErrorKind::MissingMember,
        format!("member {index} of pool {} is missing: {path}: {why}", uuid_text(&pool.pool)),
    )
}

fn member_at(pool: &Superblock, index: usize, path: PathBuf, hook: Option<&DeviceHook>) -> Result<Located> {
    let kind = match kind_at(&path) {
        Ok(kind) => kind,
        Err(error) => return Err(missing(pool, index, &error.chain())),
    };
    let found = match format::read_through(&path, kind, hook) {
        Ok(found) => found,
        Err(error) if matches!(error.kind(), ErrorKind::NotAPool | ErrorKind::NotFound) => {
            return Err(missing(pool, index, &error.chain()));
        }
        Err(error) => return Err(error),
    };
    check_member(pool, index, &path, &found.superblock)?;
    Ok(Located { path, kind, found })
}

/// Refuses what is not this pool's member with this index.
fn check_member(pool: &Superblock, index: usize, path: &Path, other: &Superblock) -> Result<()> {
    let entry = &pool.members[index];
    let wrong = |text: String| Err(Error::new(ErrorKind::WrongMember, format!("{}: {text}", path.display())));
    if other.pool != pool.pool {
        return wrong(format!(
            "it belongs to pool {}, not to pool {}",
            uuid_text(&other.pool),
            uuid_text(&pool.pool)
        ));
    }
    if other.index as usize != index {
        return wrong(format!(
            "it is member {} of the pool, not member {index}: members were swapped",
            other.index
        ));
    }
    let own = other.members.get(index).map(|own| own.id);
    if own != Some(entry.id) {
        return wrong(format!("it is another member {index} than the one that the pool was made with"));
    }
    Ok(())
}

fn info_of(path: &Path, superblock: &Superblock, members: &[Located]) -> PoolInfo {
    let place = |index: usize| {
        members
            .get(index)
            .map_or_else(|| superblock.members[index].path.clone(), |member| member.path.clone())
    };
    PoolInfo {
        id: uuid_text(&superblock.pool),
        version: format::VERSION,
        members: superblock
            .members
            .iter()
            .enumerate()
            .map(|(index, entry)| MemberInfo {
                index: index as u16,
                kind: entry.kind,
                path: place(index),
                id: uuid_text(&entry.id),
                bytes: entry.bytes,
            })
            .collect(),
        chunk_size: superblock.chunk_size,
        stripe_unit: superblock.stripe_unit,
        created: superblock.created,
        path: path.to_path_buf(),
        owner_pid: members.first().and_then(|member| Owner::pid(&member.path, member.kind)),
        read_only: false,
    }
}

pub(super) fn probe(path: &Path) -> Result<PoolInfo> {
    let (superblock, members) = locate(path, None)?;
    Ok(info_of(path, &superblock, &members))
}

fn geometry_of(superblock: &Superblock) -> RawGeometry {
    RawGeometry {
        zone_offset: superblock.catalog_offset,
        zone_len: superblock.catalog_len,
        data_offset: superblock.data_offset,
        data_len: superblock.data_len,
    }
}

/// Writes damaged or stale superblock copies again from the good one.
fn repair_superblocks(members: &[Located], write: &dyn Fn(usize, &Superblock) -> Result<()>) -> Vec<String> {
    let mut mended = Vec::new();
    for (index, member) in members.iter().enumerate() {
        let Some(why) = &member.found.damaged else { continue };
        tracing::warn!(member = %member.path.display(), "{why}; written again from the good copy");
        if let Err(error) = write(index, &member.found.superblock) {
            tracing::warn!(member = %member.path.display(), error = %error.chain(), "the superblock could not be repaired");
            continue;
        }
        mended.push(format!("{}: {why}; written again from the good copy", member.path.display()));
    }
    mended
}

fn check_options(options: &OpenOptions) -> Result<()> {
    if options.queue_depth == 0 || options.queue_depth > 4096 {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("a queue depth of {}: it has to be from 1 to 4096", options.queue_depth),
        ));
    }
    Ok(())
}

pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Pool> {
    check_options(options)?;
    let hook = options.device_hook.as_ref();
    let (superblock, members) = locate(path, hook)?;
    let owner = Owner::take(&members[0].path, members[0].kind, options.read_only)?;
    let mut mended = Vec::new();
    if !options.read_only {
        let write = |index: usize, superblock: &Superblock| {
            format::write_through(&members[index].path, members[index].kind, superblock, hook)
        };
        mended = repair_superblocks(&members, &write);
    }
    let devices = devices_of(&members, options)?;
    open_located(path, superblock, Opened { members, devices, mended }, owner, options)
}

/// The members that these devices say they are, and the superblock of the first.
fn locate_devices(devices: &[Arc<dyn Device>]) -> Result<(Superblock, Vec<Located>)> {
    let mut members: Vec<Located> = Vec::new();
    for device in devices {
        let found = format::read_device(&**device)?;
        members.push(Located { path: PathBuf::from(device.name()), kind: MemberKind::Image, found });
    }
    let Some(superblock) = members.first().map(|member| member.found.superblock.clone()) else {
        return Err(Error::new(ErrorKind::InvalidArgument, "a pool of no devices"));
    };
    if superblock.members.len() != members.len() {
        let text = format!("the pool has {} members, {} were given", superblock.members.len(), members.len());
        return Err(Error::new(ErrorKind::MissingMember, text));
    }
    for (index, member) in members.iter().enumerate() {
        check_member(&superblock, index, &member.path, &member.found.superblock)?;
    }
    Ok((superblock, members))
}

pub(super) fn probe_devices(devices: &[Arc<dyn Device>]) -> Result<PoolInfo> {
    let (superblock, members) = locate_devices(devices)?;
    Ok(info_of(&members[0].path, &superblock, &members))
}

/// See [`Pool::open_devices`].
pub(super) fn open_devices(devices: &[Arc<dyn Device>], options: &OpenOptions) -> Result<Pool> {
    check_options(options)?;
    let (superblock, members) = locate_devices(devices)?;
    let mut mended = Vec::new();
    if !options.read_only {
        let write =
            |index: usize, superblock: &Superblock| format::write_device(&*devices[index], superblock);
        mended = repair_superblocks(&members, &write);
    }
    let path = members[0].path.clone();
    let devices = devices.iter().cloned().map(Some).collect();
    open_located(&path, superblock, Opened { members, devices, mended }, Owner::of_devices(), options)
}

/// Members that were found, and what was mended on the way.
struct Opened {
    members: Vec<Located>,
    /// Of raw members.
    devices: Vec<Option<Arc<dyn Device>>>,
    mended: Vec<String>,
}

fn open_located(
    path: &Path,
    superblock: Superblock,
    opened: Opened,
    owner: Owner,
    options: &OpenOptions,
) -> Result<Pool> {
    let Opened { members, devices, mut mended } = opened;
    let store =
        CatalogStore::new(&members[0].path, devices[0].clone(), &geometry_of(&members[0].found.superblock));
    let files = members.len() == 1 && members[0].kind == MemberKind::Directory;
    let how = How { read_only: options.read_only, check_bytes: options.catalog_check_bytes, extents: !files };
    let mut clock = Clock::start();
    let loaded: Loaded<Live> = store.open(&superblock.pool, how)?;
    clock.lap("catalog loaded in all");
    if let Some(restored) = &loaded.restored {
        tracing::error!(pool = %path.display(), "{restored}: what was made after it is lost; run verify");
        mended.push(format!("{restored}: what was made after it is lost"));
    }
    let Loaded { catalog, mut meta, mut tree, extents, restored } = loaded;
    let in_catalog = |error: Error| error.context(store.name(false));
    let next_file = meta.next_file;
    let storage = if files {
        let quota = Some(superblock.data_len).filter(|quota| *quota > 0);
        let quota = quota.or(Some(superblock.members[0].bytes).filter(|quota| *quota > 0));
        let directory = FileDirectory::open(&members[0].path, quota, next_file, options.read_only)?;
        Storage::Files {
            directory: Arc::new(directory),
            prefetcher: Prefetcher::new(1, None)?,
            streams: Mutex::default(),
        }
    } else {
        Storage::Extents(open_extents(&superblock, &members, devices, options)?)
    };
    let mut named = HashSet::new();
    match &storage {
        Storage::Files { directory, .. } => {
            for (id, node) in tree.iter() {
                if let Some(region) = node.region().filter(|region| region.file != 0)
                    && !named.insert(region.file)
                {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        format!("two regions claim file {} (one is node {id})", region.file),
                    ));
                }
            }
            if restored.is_some() && !options.read_only {
                // Before any file is made: the copy does not know how far numbers were given out.
                let never = || false;
                let count = directory.remove_orphans(&named, u64::MAX, true, &never)?;
                tracing::warn!(count, "files that the restored catalog does not name were moved to 'lost'");
            }
            refresh_unsealed(&mut tree, directory);
            let used: u64 =
                tree.iter().filter(|(_, node)| node.region().is_some()).map(|(_, node)| node.allocated).sum();
            directory.charge_fact(used);
        }
        Storage::Extents(io) => {
            for (node, extents) in extents.map_err(in_catalog)?.iter() {
                take_extents(io, extents)
                    .map_err(|error| error.context(format!("the layout of node {node}")))?;
            }
            // Files that the restored catalog does not know may hold what it lost.
            if restored.is_none() {
                for member in io.stripes().members() {
                    member.taken_all()?;
                }
            }
        }
    }
    clock.lap("members opened, extents taken");
    let reserved_file = next_file.saturating_add(FILE_RESERVE);
    if !options.read_only {
        // Reserves file numbers; also proves that the catalog can be written.
        meta.next_file = reserved_file;
        meta.generation += 1;
        meta.saved = Timestamp::now().secs;
        catalog.apply(&Batch::new(meta.clone())).map_err(in_catalog)?;
        store.keep_reserve();
        clock.lap("first commit");
    }
    let scrub = crate::scrub::load(tree.getxattr(ROOT, crate::scrub::attribute()).ok());
    let mut info = info_of(path, &superblock, &members);
    info.read_only = options.read_only;
    info.owner_pid = (!options.read_only).then(std::process::id);
    let shared = Arc::new(Shared {
        info,
        options: options.clone(),
        pool_id: superblock.pool,
        read_only: options.read_only,
        chunk_size: superblock.chunk_size,
        tree: RwLock::new(tree),
        storage,
        catalog,
        store,
        snapshots: commit::Snapshots::default(),
        contents: Mutex::default(),
        graveyard: Mutex::default(),
        mapped: Mutex::default(),
        open: Mutex::default(),
        generation: AtomicU64::new(meta.generation),
        durable_generation: AtomicU64::new(meta.generation),
        reserved_file,
        counters: PoolCounters::default(),
        commit_error: Mutex::default(),
        mended: Mutex::new(mended),
        scrub: Mutex::new(scrub),
        flush_failed: OnceLock::new(),
        kv_open: Mutex::default(),
        stop: Mutex::new(false),
        wake: Condvar::new(),
        kick: AtomicBool::new(false),
        _owner: owner,
    });
    if let Storage::Extents(io) = &shared.storage {
        let weak = Arc::downgrade(&shared);
        io.set_reclaim(move || weak.upgrade().map_or(Ok(false), |shared| shared.reclaim()));
    }
    let inner = Inner { shared: shared.clone(), threads: Mutex::default(), closed: AtomicBool::new(false) };
    if !options.read_only {
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(run);
            thread.map_err(|error| Error::io(format!("start the thread {name}"), error))
        };
        let committer = shared.clone();
        lock(&inner.threads).push(spawn("nvtier-commit", Box::new(move || commit::run(&committer)))?);
        let sweeper = shared.clone();
        let sweep = Box::new(move || sweep(&sweeper, &named, next_file));
        lock(&inner.threads).push(spawn("nvtier-sweep", sweep)?);
    }
    Ok(Pool { inner: Arc::new(inner) })
}

/// Removes files that a crash left behind, and sums regions that it left without sums.
fn sweep(shared: &Arc<Shared>, named: &HashSet<u64>, limit: u64) {
    let stop = || *lock(&shared.stop);
    if let Storage::Files { directory, .. } = &shared.storage {
        match directory.remove_orphans(named, limit, false, &stop) {
            Ok(0) => {}
            Ok(count) => {
                shared.counters.orphans.fetch_add(count, Relaxed);
                tracing::info!(count, "removed files of regions whose writing a crash ended");
            }
            Err(error) => {
                tracing::warn!(error = %error.chain(), "cannot look for files that a crash left behind")
            }
        }
    }
    if let Err(error) = crate::verify::reseal(shared, &stop) {
        tracing::warn!(error = %error.chain(), "cannot make checksums of regions that a crash left without");
    }
}

/// A region that was open for writing in place has the size and time that its file says.
fn refresh_unsealed(tree: &mut Tree<Live>, directory: &FileDirectory) {
    let unsealed: Vec<_> = tree
        .iter()
        .filter_map(|(id, node)| {
            node.region().filter(|region| !region.sealed && region.file != 0).map(|region| (id, region.file))
        })
        .collect();
    for (id, file) in unsealed {
        let meta = match fs::metadata(directory.file_path(file)) {
            Ok(meta) => meta,
            Err(error) => {
                tracing::error!(node = id, file, %error, "the file of a region cannot be read");
                continue;
            }
        };
        if let Ok(node) = tree.get_mut(id) {
            let modified = Timestamp { secs: meta.mtime(), nanos: meta.mtime_nsec() as u32 };
            node.size = meta.len();
            node.allocated = allocated(&meta);
            node.mtime = node.mtime.max(modified);
            node.ctime = node.ctime.max(modified);
        }
    }
}

/// The devices of raw members: one descriptor each, since block devices are claimed exclusively.
fn devices_of(members: &[Located], options: &OpenOptions) -> Result<Vec<Option<Arc<dyn Device>>>> {
    let open = |member: &Located| match member.kind {
        MemberKind::Directory => Ok(None),
        _ => nvme::open(&member.path, &DeviceOptions { direct: true, read_only: options.read_only })
            .map(|device| match &options.device_hook {
                Some(hook) => hook.wrap(&member.path, device),
                None => device,
            })
            .map(Some)
            .map_err(|error| Error::from(error).context(format!("open member {}", member.path.display()))),
    };
    members.iter().map(open).collect()
}

fn open_extents(
    superblock: &Superblock,
    members: &[Located],
    devices: Vec<Option<Arc<dyn Device>>>,
    options: &OpenOptions,
) -> Result<Arc<ExtentIo>> {
    // A simulated device repeats what a seed did only where its operations come in one order: written in step.
    let simulated = devices.iter().flatten().any(|device| device.kind() == nvme::DeviceKind::Sim);
    let writers = if simulated { 0 } else { members.len().clamp(2, 4) };
    let mut opened: Vec<Arc<dyn Member>> = Vec::new();
    for (index, (member, device)) in members.iter().zip(devices).enumerate() {
        let index = index as u16;
        let own = &member.found.superblock;
        let chunk_size = superblock.chunk_size;
        opened.push(match device {
            None => {
                let quota = Some(own.data_len).filter(|quota| *quota > 0);
                let options =
                    ExtentDirectoryOptions { index, chunk_size, quota, read_only: options.read_only };
                Arc::new(ExtentDirectory::new(&member.path, &options)?)
            }
            Some(device) => {
                Arc::new(RawMember::new(index, &member.path, device, geometry_of(own), chunk_size)?)
            }
        });
    }
    ExtentIo::new(
        opened,
        &ExtentIoOptions {
            chunk_size: superblock.chunk_size,
            stripe_unit: superblock.stripe_unit,
            ram_bytes: options.ram_bytes,
            verify: matches!(options.verify, Verify::Always | Verify::Scrub),
            writers,
        },
    )
}

fn take_extents(io: &ExtentIo, extents: &[Extent]) -> Result<()> {
    let take = |extents: &[Extent]| {
        let Some(first) = extents.first() else { return Ok(()) };
        let place = io.stripes().members().get(first.member as usize);
        place
            .ok_or_else(|| {
                let text = format!("an extent on member {}, which does not exist", first.member);
                Error::new(ErrorKind::Corrupt, text)
            })?
            .take(extents)
    };
    if extents.iter().all(|extent| extent.member == extents[0].member) {
        return take(extents);
    }
    let mut of_member: BTreeMap<u16, Vec<Extent>> = BTreeMap::new();
    for extent in extents {
        of_member.entry(extent.member).or_default().push(*extent);
    }
    of_member.values().try_for_each(|extents| take(extents))
}

/// Free bytes of all members, where directories on one file system share what that has.
pub(super) fn shared_space(members: &[Arc<dyn Member>]) -> u64 {
    let mut raw = 0u64;
    let mut of_file_system: HashMap<u64, (u64, u64)> = HashMap::new();
    for member in members {
        match (member.kind(), space(member.path())) {
            (MemberKind::Directory, Ok(space)) => {
                let (free, asked) = of_file_system.entry(space.id).or_insert((space.free_bytes, 0));
                *free = (*free).min(space.free_bytes);
                *asked += member.free_bytes();
            }
            _ => raw += member.free_bytes(),
        }
    }
    raw + of_file_system.values().map(|(free, asked)| free.min(asked)).sum::<u64>()
}
