//! Emulated NVMe drives behind the kernel's own driver, in a virtual machine.

use anyhow::Result;

use super::Shared;
use crate::guest;
use crate::tally::Outcome;

/// Runs the suite, or says why it cannot.
pub fn run(shared: &Shared) -> Result<Outcome> {
    let kills = if shared.quick { "1" } else { "2" };
    let variables = [("NVTIER_GUEST_KILLS", kills.to_owned())];
    let folder = shared.folder("guest")?;
    let filter = shared.filter.as_deref();
    guest::checks(&folder, &shared.nvtier, filter, &variables, &shared.log("guest"), &mut |_| ())
}
