//! Ids and rows that a plan may give out: the lowest free ones, so that a plan that failed gives out the same again.

use std::{collections::btree_map::Keys, iter::Peekable, time::Instant};

use lb_common::limits::RING_ROWS_LARGE;

use super::programmed::{Programmed, Slot};

/// Free backend ids in rising order; id 0 is never one.
pub(super) struct BackendIds<'a> {
    used: Peekable<Keys<'a, u32, Slot>>,
    next: u32,
    end: u32,
}

impl<'a> BackendIds<'a> {
    pub fn new(programmed: &'a Programmed, capacity: u32) -> Self {
        Self {
            used: programmed.slots.keys().peekable(),
            next: 1,
            end: capacity,
        }
    }

    /// The next free id, or `None` when `BACKENDS` is full.
    pub fn take(&mut self) -> Option<u32> {
        while self.next < self.end {
            let id = self.next;
            self.next += 1;
            while self.used.next_if(|used| **used < id).is_some() {}
            if self.used.peek() != Some(&&id) {
                return Some(id);
            }
        }
        None
    }
}

/// Free service ids in rising order. Id 0 stands for no service in events.
pub(super) struct ServiceIds<'a> {
    programmed: &'a Programmed,
    next: u32,
    end: u32,
}

impl<'a> ServiceIds<'a> {
    pub fn new(programmed: &'a Programmed, capacity: u32) -> Self {
        Self {
            programmed,
            next: 1,
            end: capacity,
        }
    }

    /// The next free id, or `None` when there are as many services as the maps hold.
    pub fn take(&mut self) -> Option<u32> {
        let id = (self.next..self.end).find(|id| self.programmed.is_free_service(*id))?;
        self.next = id + 1;
        Some(id)
    }
}

/// Rows of `RINGS` without a ring, now or recently.
pub(super) struct Rows {
    used: Vec<bool>,
    /// When the next quarantined row may be used.
    next_release: Option<Instant>,
}

/// Why there is no row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRow {
    /// Rows come free then.
    Until(Instant),
    /// All rows have rings.
    Full,
}

impl Rows {
    pub fn new(programmed: &Programmed, capacity: u32, now: Instant) -> Self {
        let mut this = Self {
            used: vec![false; capacity as usize],
            next_release: None,
        };
        for (first, rows, until) in programmed.rows(now) {
            this.fill(first as usize, rows as usize);
            if let Some(until) = until {
                this.next_release = Some(this.next_release.map_or(until, |next| next.min(until)));
            }
        }
        this
    }

    /// Takes consecutive rows: large rings from the end, small ones from the start, so that they do not mix. A `new`
    /// ring leaves one large ring's rows free (on maps that are large enough): otherwise no ring could change any more.
    pub fn take(&mut self, rows: u32, new: bool) -> Result<u32, NoRow> {
        let rows = rows as usize;
        let spare = match (new, self.used.len()) {
            (true, 16..) => RING_ROWS_LARGE as usize,
            (true, 2..) => 1,
            _ => 0,
        };
        let free = self.used.iter().filter(|used| !**used).count();
        let is_free = |first: &usize| !self.used[*first..*first + rows].contains(&true);
        let firsts = 0..(self.used.len() + 1).saturating_sub(rows);
        let first = match rows {
            _ if free < rows + spare => None,
            1 => firsts.into_iter().find(is_free),
            _ => firsts.rev().find(is_free),
        };
        match (first, self.next_release) {
            (Some(first), _) => {
                self.fill(first, rows);
                Ok(first as u32)
            }
            (None, Some(until)) => Err(NoRow::Until(until)),
            (None, None) => Err(NoRow::Full),
        }
    }

    fn fill(&mut self, first: usize, rows: usize) {
        let end = (first + rows).min(self.used.len());
        if first < end {
            self.used[first..end].fill(true);
        }
    }
}
