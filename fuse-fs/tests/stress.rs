//! Several threads at once on one mount, each checked against a model of its own part, all of it checked again after a remount.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Mount, Way, pattern};

const THREADS: u64 = 6;
const STEPS: u64 = 400;
const NAMES: u64 = 12;
const LARGEST: u64 = 200_000;

/// xorshift64*: small, seeded, the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

type Model = BTreeMap<String, Vec<u8>>;

/// Does random things in a directory that only this thread changes, and checks each against the model.
fn work(directory: &Path, shared: &Path, seed: u64) -> Model {
    let mut random = Random(seed | 1);
    let mut model = Model::new();
    for step in 0..STEPS {
        let name = format!("f{}", random.below(NAMES));
        let path = directory.join(&name);
        match random.below(10) {
            0..=2 => {
                let content = pattern(random.below(1 << 40), random.below(LARGEST) as usize);
                fs::write(&path, &content).unwrap();
                model.insert(name, content);
            }
            3 => {
                assert_eq!(
                    fs::remove_file(&path).is_ok(),
                    model.remove(&name).is_some(),
                    "seed {seed} step {step}"
                );
            }
            4 => {
                let target = format!("f{}", random.below(NAMES));
                let moved = fs::rename(&path, directory.join(&target)).is_ok();
                let content = model.remove(&name);
                assert_eq!(moved, content.is_some(), "seed {seed} step {step}");
                if let Some(content) = content {
                    model.insert(target, content);
                }
            }
            5..=6 => {
                if let Some(content) = model.get_mut(&name) {
                    let offset = random.below(LARGEST);
                    let piece = pattern(step, 1 + random.below(20_000) as usize);
                    let file = File::options().read(true).write(true).open(&path).unwrap();
                    file.write_all_at(&piece, offset).unwrap();
                    let end = offset as usize + piece.len();
                    if content.len() < end {
                        content.resize(end, 0);
                    }
                    content[offset as usize..end].copy_from_slice(&piece);
                    if random.below(4) == 0 {
                        let len = random.below(LARGEST);
                        file.set_len(len).unwrap();
                        content.resize(len as usize, 0);
                    }
                    if random.below(8) == 0 {
                        file.sync_all().unwrap();
                    }
                    assert_eq!(
                        file.metadata().unwrap().len(),
                        content.len() as u64,
                        "seed {seed} step {step}"
                    );
                }
            }
            7 => {
                // In the directory that everybody works in: names of our own, listings that race.
                let mine = shared.join(format!("{seed}-{step}"));
                File::create(&mine).unwrap();
                let listed = fs::read_dir(shared).unwrap().any(|entry| entry.unwrap().path() == mine);
                assert!(listed, "seed {seed} step {step}: an existing name is not listed");
                fs::remove_file(&mine).unwrap();
            }
            _ => {
                let read = fs::read(&path).ok();
                assert!(read.as_ref() == model.get(&name), "seed {seed} step {step}: {name} reads wrong");
            }
        }
    }
    model
}

fn check(directory: &Path, model: &Model) {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, model.keys().cloned().collect::<Vec<_>>());
    for (name, content) in model {
        assert!(
            &fs::read(directory.join(name)).unwrap() == content,
            "{} reads wrong",
            directory.join(name).display()
        );
    }
}

fn stress(way: Way) {
    let Some(mut mount) = Mount::new(way) else { return };
    let seed = std::env::var("NVTIER_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed_0001);
    println!("NVTIER_SEED={seed}");
    let directory = |thread: u64| mount.path(format!("t{thread}"));
    let shared = mount.path("shared");
    fs::create_dir(&shared).unwrap();
    let models: Vec<Model> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (directory, shared) = (directory(thread), &shared);
                fs::create_dir(&directory).unwrap();
                scope.spawn(move || work(&directory, shared, seed + thread))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (thread, model) in models.iter().enumerate() {
        check(&directory(thread as u64), model);
    }
    assert_eq!(fs::read_dir(&shared).unwrap().count(), 0);
    mount.unmount();
    mount.mount();
    for (thread, model) in models.iter().enumerate() {
        check(&mount.path(format!("t{thread}")), model);
    }
    mount.unmount();
    let pool = common::open_pool(&mount.pool_path(), way);
    let report = pool.verify(None, &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
    pool.close().unwrap();
}

#[test]
fn threads_against_models_passed() {
    stress(Way::Passed);
}

#[test]
fn threads_against_models_served() {
    stress(Way::Served);
}
