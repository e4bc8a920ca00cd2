//! A claim that fails for what is in one row (content that can't be read, say): tried with fewer tasks, until the culprit is alone and can
//! be set aside, so that it keeps nobody from being claimed.

use crate::engine::consume::claim::{Asked, Brought, Claimer};
use crate::engine::consume::counters::Counters;
use crate::engine::consume::trouble::Named;
use crate::engine::error::{Error, Result};

/// Tasks set aside one right after the other. Beyond that it is no single row that is to blame: one more each time that a claim is tried.
const IN_A_ROW: u32 = 3;

/// How far the search has come.
#[derive(Debug)]
pub(super) struct Search {
    /// Tasks in a claim, at most. Halved when one fails, doubled when one works.
    most: i64,
    /// Set aside since a claim worked.
    in_a_row: u32,
    named: Named,
}

impl Search {
    /// Nothing is being looked for.
    pub(super) fn new() -> Self {
        Self { most: i64::MAX, in_a_row: 0, named: Named::default() }
    }

    /// What a claim brought can't be read: the next ones bring one task each.
    pub(super) fn look_closer(&mut self) {
        self.most = 0;
    }
}

impl Claimer<'_> {
    /// Sends a claim, of fewer tasks while a culprit is looked for. `None`: it failed for one, and what to do next is settled. An error:
    /// any other, or that claims fail whatever is in them.
    pub(super) async fn claim_or_search(&mut self, asked: &mut Asked) -> Result<Option<Brought>> {
        asked.tasks = asked.tasks.min(self.search.most);
        if self.search.most == 1 {
            // One row is locked, so that what fails is the first task of the first chunk.
            asked.chunks.fill(1);
            asked.limit = 1;
        }
        match self.claim(asked).await {
            Ok(brought) => {
                // 0: this one could not be read, and the next one is to find out why.
                self.search.most = self.search.most.saturating_mul(2).max(1);
                self.search.in_a_row = 0;
                Ok(Some(brought))
            }
            Err(e) if e.is_data_fault() => {
                // The server said no: nothing of it is held there.
                self.books.borrow_mut().claiming_after = None;
                if self.search.most == 1 {
                    self.set_aside(asked, &e).await?;
                    self.search.in_a_row += 1;
                    if self.search.in_a_row > IN_A_ROW {
                        return Err(e);
                    }
                } else {
                    self.search.most = (asked.tasks / 2).max(1);
                }
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    async fn set_aside(&mut self, asked: &Asked, error: &Error) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        Counters::add(&self.shared.counters.statements, 1);
        let row = link.query_opt("set_aside_task", &[&asked.lanes, &asked.tracks, &asked.hints]).await?;
        // None: another has it now.
        let Some(id) = row.map(|row| row.get::<_, i64>(0)) else { return Ok(()) };
        let level = self.search.named.level(id);
        let message = format!("task {id} can't be claimed, and is put off for a minute: {error}");
        self.shared.log(level, "claimer", message);
        Ok(())
    }
}
