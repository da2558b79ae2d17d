//! What must hold of all tables between any two calls?

use super::super::compose::{Composed, compose};
use super::*;
use crate::host::{ENTRIES, Frames};
use crate::testing::{Ram, TestHost};

impl Shadow {
    /// Checks what must hold between any two calls: each table is found by its key, referred to as
    /// often as it says, marks what it holds, and no frame is lost.
    pub(crate) fn check(&self, host: &TestHost) {
        let mut references = alloc::vec![0; self.pool.capacity()];
        for root in self.roots.iter().flatten() {
            references[root.table.0 as usize] += 1;
            assert_eq!(root.eptp02.table(), self.pool.hpa(root.table).as_u64());
            assert_eq!(root.eptp02.accessed_dirty(), root.eptp12.accessed_dirty());
            assert!(self.find_root(root.eptp12).is_some());
        }
        let mut ept01 = Ram::new(0);
        ept01.hidden.clone_from(&host.ram.hidden);
        ept01.remapped.clone_from(&host.ram.remapped);
        ept01.leaf_shift = host.ram.leaf_shift;
        let mut used = 0;
        for number in 0..self.pool.capacity() {
            let id = TableId(number as u32);
            let table = self.pool.get(id).unwrap();
            if table.references == 0 {
                continue;
            }
            used += 1;
            assert_eq!(self.pool.find(table.key), Some(id));
            let live: Vec<_> = bits(table.live).collect();
            for at in bits(table.alike) {
                assert!(live.contains(&at), "{at} of {table:?}");
                let value = host.load(self.pool.hpa(id), at);
                assert_eq!(self.child(table.key.level, value), None, "{at} of {table:?}");
                // What it was composed from gives it again.
                let from = EptEntry::from(value ^ table.difference);
                let page = L1Gpa::new(from.address());
                let flags = table.key.role.accessed_dirty();
                match compose(&mut ept01, from, page, table.key.level, flags) {
                    Composed::Entry(again) => assert_eq!(again, value, "{at} of {table:?}"),
                    Composed::Split(_) => panic!("{at} of {table:?} is a table"),
                }
            }
            for at in 0..ENTRIES {
                let value = host.load(self.pool.hpa(id), at);
                assert_eq!(live.contains(&at), value != EMPTY, "{at} of {table:?}");
                if let Some(child) = self.child(table.key.level, value) {
                    references[child.0 as usize] += 1;
                    assert_eq!(self.pool.get(child).unwrap().key.level, table.key.level - 1);
                }
            }
        }
        for (number, references) in references.into_iter().enumerate() {
            assert_eq!(self.pool.get(TableId(number as u32)).unwrap().references, references);
        }
        assert_eq!(self.usage().0, used);
        assert_eq!(self.usage().1, self.roots.iter().flatten().count());
        assert!(self.processors.iter().flat_map(|cpu| cpu.root).all(|id| self.root(id).is_some()));
    }
}
