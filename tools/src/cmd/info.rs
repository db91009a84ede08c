//! `nvtier info`: what a pool is, and how full; or what a drive is.

use engine::{Pool, PoolInfo, PoolStat};
use serde_json::json;

use crate::cli::{Global, Info};
use crate::cmd::drive;
use crate::cmd::format::kind_word;
use crate::config::Config;
use crate::failure::{Failure, Outcome, code};
use crate::output;
use crate::store::Store;
use crate::{size, time};

/// Prints it. A pool whose owner lets nobody in is described by its superblocks alone.
pub fn run(global: &Global, config: &Config, args: &Info) -> Outcome {
    let path = match &args.path {
        Some(path) => path.clone(),
        None => config.pool(args.pool.pool.as_ref())?,
    };
    if args.drive || drive::is_controller(&path) {
        return drive::run(global, &path);
    }
    let (info, stat, owner) = match Store::open(&path, true) {
        Ok(store) => (store.info()?, Some(store.stat()?), store.other_owner()),
        Err(failure) if failure.code == code::BUSY => {
            let info = Pool::probe(&path).map_err(|error| {
                Failure::from(error).while_doing(format!("read the superblocks of {}", path.display()))
            })?;
            let owner = info.owner_pid;
            output::note(&format!("only the superblocks were read: {}", failure.message));
            (info, None, owner)
        }
        // A namespace without a pool is still a drive.
        Err(failure) if failure.kind == "NotAPool" && nvme::passthrough::Drive::open(&path).is_ok() => {
            return drive::run(global, &path);
        }
        Err(failure) => return Err(failure),
    };
    if global.json {
        return output::json(&json!({ "info": info, "stat": stat, "owner_pid": owner }));
    }
    output::line(&describe(&info, stat.as_ref(), owner))
}

fn describe(info: &PoolInfo, stat: Option<&PoolStat>, owner: Option<u32>) -> String {
    let mut lines = vec![
        format!("pool         {}", info.path.display()),
        format!("id           {}", info.id),
        format!("format       {}, made {} UTC", info.version, time::utc(info.created)),
        format!(
            "geometry     chunks of {}, stripe unit {}",
            size::human(info.chunk_size.into()),
            size::human(info.stripe_unit)
        ),
    ];
    for member in &info.members {
        let bytes = if member.bytes == 0 { "no quota".to_owned() } else { size::human(member.bytes) };
        let kind = kind_word(member.kind);
        lines.push(format!("member {:<5} {} ({kind}, {bytes})", member.index, member.path.display()));
    }
    match owner {
        Some(pid) => lines.push(format!("owner        process {pid}")),
        None => lines.push("owner        none".to_owned()),
    }
    if let Some(stat) = stat {
        let share = 100.0 * stat.used_bytes as f64 / stat.capacity_bytes.max(1) as f64;
        lines.push(format!(
            "space        {} used of {} ({share:.1}%), {} free",
            size::human(stat.used_bytes),
            size::human(stat.capacity_bytes),
            size::human(stat.free_bytes)
        ));
        lines.push(format!("regions      {} (of {} names and nodes)", stat.regions, stat.nodes));
        lines.push(format!("generation   {}", stat.generation));
        if stat.unsealed_regions > 0 {
            lines.push(format!("unsealed     {} regions have no valid checksums now", stat.unsealed_regions));
        }
        if stat.corrupt_chunks > 0 {
            lines.push(format!(
                "CORRUPT      {} chunks failed their checksum; run `nvtier verify`",
                stat.corrupt_chunks
            ));
        }
        if !stat.commit_error.is_empty() {
            lines.push(format!("COMMIT       the last background commit failed: {}", stat.commit_error));
        }
    }
    lines.join("\n")
}
