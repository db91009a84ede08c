//! The smallest plan that still fails.

use crate::driver::{Options, Outcome, run};
use crate::plan::Plan;

/// Runs that a search may take.
const TRIES: usize = 400;

/// Takes away what is not needed for a violation: rounds, acts, actors, cuts while opening, bytes; and cuts earlier.
pub fn shrink(plan: &Plan, options: &Options) -> (Plan, Outcome) {
    let mut search = Search { options, tries: TRIES, best: plan.clone(), outcome: run(plan, options) };
    if search.outcome.violation.is_none() {
        return (search.best, search.outcome);
    }
    loop {
        let before = search.best.clone();
        search.rounds();
        search.actors();
        search.acts();
        search.cuts();
        search.bytes();
        if search.best == before || search.tries == 0 {
            return (search.best, search.outcome);
        }
    }
}

struct Search<'a> {
    options: &'a Options,
    tries: usize,
    best: Plan,
    outcome: Outcome,
}

impl Search<'_> {
    /// Takes a plan over if it fails too.
    fn accept(&mut self, plan: Plan) -> bool {
        if self.tries == 0 || plan == self.best {
            return false;
        }
        self.tries -= 1;
        let outcome = run(&plan, self.options);
        let fails = outcome.violation.is_some();
        if fails {
            (self.best, self.outcome) = (plan, outcome);
        }
        fails
    }

    fn rounds(&mut self) {
        let mut index = self.best.rounds.len();
        while index > 0 {
            index -= 1;
            let mut plan = self.best.clone();
            plan.rounds.remove(index);
            self.accept(plan);
        }
    }

    fn actors(&mut self) {
        for slot in 0..crate::act::SLOTS {
            let mut plan = self.best.clone();
            for round in &mut plan.rounds {
                round.acts.retain(|act| act.slot() != Some(slot));
            }
            self.accept(plan);
        }
    }

    fn acts(&mut self) {
        for round in 0..self.best.rounds.len() {
            let mut width = self.best.rounds[round].acts.len().div_ceil(2);
            while width > 0 {
                let mut end = self.best.rounds[round].acts.len();
                while end > 0 {
                    let start = end.saturating_sub(width);
                    let mut plan = self.best.clone();
                    plan.rounds[round].acts.drain(start..end);
                    self.accept(plan);
                    end = start;
                }
                width /= 2;
            }
        }
    }

    fn cuts(&mut self) {
        for round in 0..self.best.rounds.len() {
            while !self.best.rounds[round].recovery.is_empty() {
                let mut plan = self.best.clone();
                plan.rounds[round].recovery.pop();
                if !self.accept(plan) {
                    break;
                }
            }
            for step in [self.best.rounds[round].cut / 2, 8, 4, 2, 1] {
                loop {
                    let mut plan = self.best.clone();
                    let cut = &mut plan.rounds[round].cut;
                    if step == 0 || *cut < step {
                        break;
                    }
                    *cut -= step;
                    if !self.accept(plan) {
                        break;
                    }
                }
            }
        }
    }

    fn bytes(&mut self) {
        for round in 0..self.best.rounds.len() {
            for act in 0..self.best.rounds[round].acts.len() {
                while let Some(smaller) = self.best.rounds[round].acts[act].smaller() {
                    let mut plan = self.best.clone();
                    plan.rounds[round].acts[act] = smaller;
                    if !self.accept(plan) {
                        break;
                    }
                }
            }
        }
    }
}
