//! `nvtier format POOL`: makes a pool.

use engine::{FormatOptions, MemberKind, Pool, PoolInfo};

use crate::cli::{Format, Global};
use crate::failure::{Failure, Outcome};
use crate::{output, size};

/// Formats and says what was made.
pub fn run(global: &Global, args: &Format) -> Outcome {
    let mut options =
        FormatOptions { size: args.size, force: args.force, raw: args.raw, ..FormatOptions::default() };
    options.members.clone_from(&args.members);
    if let Some(chunk_size) = args.chunk_size {
        options.chunk_size = u32::try_from(chunk_size).map_err(|_| {
            Failure::usage("a chunk is at most 4MiB").hint("leave --chunk-size out for 16KiB")
        })?;
    }
    if let Some(stripe_unit) = args.stripe_unit {
        options.stripe_unit = stripe_unit;
    }
    let info = Pool::format(&args.pool, &options)
        .map_err(|error| Failure::from(error).while_doing(format!("format {}", args.pool.display())))?;
    if global.json {
        return output::json(&info);
    }
    output::line(&describe(&info))
}

fn describe(info: &PoolInfo) -> String {
    let mut lines = vec![format!(
        "pool {} at {}: chunks of {}, stripe unit {}",
        info.id,
        info.path.display(),
        size::human(info.chunk_size.into()),
        size::human(info.stripe_unit)
    )];
    for member in &info.members {
        let bytes = match (member.kind, member.bytes) {
            (MemberKind::Directory, 0) => "as large as its file system".to_owned(),
            (MemberKind::Directory, bytes) => format!("quota {}", size::human(bytes)),
            (_, bytes) => size::human(bytes),
        };
        lines.push(format!(
            "  member {}: {} ({}), {bytes}",
            member.index,
            member.path.display(),
            kind_word(member.kind)
        ));
    }
    lines.join("\n")
}

/// `directory`, `block` or `image`, as in JSON.
pub fn kind_word(kind: MemberKind) -> &'static str {
    match kind {
        MemberKind::Directory => "directory",
        MemberKind::Block => "block",
        MemberKind::Image => "image",
    }
}
