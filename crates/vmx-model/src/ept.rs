//! What does EPT make of a guest-physical address?
//!
//! SDM Vol. 3C, "The Extended Page Table Mechanism (EPT)": the walk of four levels, through the
//! guest-physical mappings that are cached, with accessed and dirty flags. Memory types are judged
//! (a reserved one is a misconfiguration) and have no other effect.

use vmx_defs::ept::{EptEntry, EptPermissions, EptViolation, Eptp};
use vmx_defs::{Gva, Hpa};

use crate::addr::Gpa;
use crate::caches::{EptPage, GuestStructure, GuestTranslation};
use crate::ept_format::EntryFormat;
use crate::memory::Memory;
use crate::processor::Processor;
use crate::stop::{Flow, Stop, Violation};

/// Why a guest-physical address is accessed: decides what an EPT violation reports.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// The access that the linear address was used for; what paging said of it, for the advanced
    /// exit information.
    Linear { gva: Gva, paging: PagingRights },
    /// Access to a paging-structure entry on the way to the linear address.
    Structure { gva: Gva },
    /// A load of the PDPTE registers.
    Pdptes,
}

/// What paging says of a linear address (advanced VM-exit information for EPT violations).
#[derive(Clone, Copy, Debug)]
pub(crate) struct PagingRights {
    pub(crate) user: bool,
    pub(crate) writable: bool,
    pub(crate) no_execute: bool,
}

impl PagingRights {
    /// Without paging.
    pub(crate) const ALL: Self = Self { user: true, writable: true, no_execute: false };
}

/// How an EPT walk fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failure {
    Violation { rights: EptPermissions, suppress_ve: bool },
    Misconfiguration,
}

/// Log2 of the bytes that a 4-level EPT translates.
const WIDTH: u8 = 48;

impl GuestTranslation {
    /// Where an address of the page is.
    #[inline]
    pub(crate) fn locate(&self, gpa: Gpa) -> Hpa {
        Hpa::new(self.page.as_u64() | gpa.as_u64() & ((1 << self.shift) - 1))
    }
}

impl Processor {
    /// Translates a guest-physical address with the EPT in use, for an access that needs `wanted`.
    /// Where EPT is not in use, the address is the physical one.
    #[inline]
    pub(crate) fn translate_guest_physical(
        &mut self,
        memory: &mut Memory,
        gpa: Gpa,
        wanted: EptPermissions,
        purpose: Purpose,
    ) -> Flow<GuestTranslation> {
        let Some(eptp) = self.eptp() else {
            let page = Hpa::new(gpa.as_u64() & !0xfff);
            return Ok(GuestTranslation { page, shift: 12, ept: EptPage::NONE });
        };
        let write = wanted.contains(EptPermissions::WRITE);
        if let Some(cached) = self.caches.guest_translation(eptp.table(), gpa) {
            if !cached.ept.rights.contains(wanted) {
                let EptPage { rights, suppress_ve, .. } = cached.ept;
                let failure = Failure::Violation { rights, suppress_ve };
                return Err(self.ept_stop(eptp, gpa, wanted, purpose, failure));
            }
            // A write through a mapping whose dirty flag is not known to be set walks again.
            if !write || cached.ept.dirty {
                return Ok(cached);
            }
        }
        let linear = match purpose {
            Purpose::Linear { gva, .. } | Purpose::Structure { gva } => Some(gva),
            Purpose::Pdptes => None,
        };
        let walked = if self.chooser.is_some() {
            self.choose_walk(memory, |processor, memory| {
                // Nothing is cached: only where the page is makes a difference.
                let found = processor.walk_ept(memory, eptp, gpa, wanted, linear)?;
                let page = found.locate(gpa).page();
                Ok(GuestTranslation { page, shift: 12, ept: EptPage::NONE })
            })
        } else {
            self.walk_ept(memory, eptp, gpa, wanted, linear)
        };
        match walked {
            Ok(found) => Ok(found),
            Err(failure) => Err(self.ept_stop(eptp, gpa, wanted, purpose, failure)),
        }
    }

    /// The walk, from the lowest table that is cached. Flags are set once it has succeeded.
    fn walk_ept(
        &mut self,
        memory: &mut Memory,
        eptp: Eptp,
        gpa: Gpa,
        wanted: EptPermissions,
        linear: Option<Gva>,
    ) -> Result<GuestTranslation, Failure> {
        let none = EptPermissions::empty();
        let since = self.ept_horizon(eptp, gpa, linear);
        if gpa.as_u64() >> WIDTH != 0 {
            return Err(Failure::Violation { rights: none, suppress_ve: true });
        }
        let ep4ta = eptp.table();
        let unmarked = self.unmarked(eptp, since);
        let flags = eptp.accessed_dirty();
        let write = wanted.contains(EptPermissions::WRITE);
        // The span of a table with entries of 4-KByte pages is 21.
        let (mut span, mut table, began) = match self.caches.guest_structure(ep4ta, gpa) {
            Some((span, cached)) => (span, cached.table, cached.rights),
            None => (WIDTH, Hpa::new(ep4ta), EptPermissions::all()),
        };
        let mut rights = began;
        let mut used = [(Hpa::new(0), EptEntry::new()); 4];
        let mut count = 0;
        let page = loop {
            let shift = span - 9;
            let at = Hpa::new(table.as_u64() | (gpa.as_u64() >> shift & 0x1ff) << 3);
            let flags = flags && count >= unmarked;
            let entry = self.ept_entry(memory, at, flags, since);
            let stale = entry.into_bits() != memory.read_u64(at);
            let level = (shift - 12) / 9 + 1;
            match self.caps.ept_entry_format(entry.into_bits(), level) {
                EntryFormat::Misconfigured => {
                    self.refuse_choice(stale);
                    return Err(Failure::Misconfiguration);
                }
                EntryFormat::NotPresent => {
                    self.refuse_choice(stale);
                    let suppress_ve = entry.suppress_ve();
                    return Err(Failure::Violation { rights: none, suppress_ve });
                }
                class => {
                    rights &= entry.permissions();
                    // A mapping that is cached is walked again for its dirty flag.
                    let page = class == EntryFormat::Page;
                    self.refuse_choice(stale && page && flags && write && !entry.dirty());
                    used[count] = (at, entry);
                    count += 1;
                    if class == EntryFormat::Page {
                        break GuestTranslation {
                            page: Hpa::new(entry.address() & !((1 << shift) - 1)),
                            shift,
                            ept: EptPage {
                                rights,
                                dirty: !flags || write || entry.dirty(),
                                suppress_ve: entry.suppress_ve(),
                            },
                        };
                    }
                }
            }
            table = Hpa::new(entry.address());
            span = shift;
        };
        if !rights.contains(wanted) {
            let suppress_ve = page.ept.suppress_ve;
            return Err(Failure::Violation { rights, suppress_ve });
        }

        // SDM Vol. 3C, "Accessed and Dirty Flags for EPT".
        if flags {
            for (index, (at, entry)) in used[..count].iter().enumerate().skip(unmarked) {
                let leaf = index + 1 == count;
                if self.chooser.is_some() && memory.read_u64(*at) != entry.into_bits() {
                    continue;
                }
                let marked = entry.with_accessed(true).with_dirty(entry.dirty() || leaf && write);
                if marked != *entry {
                    memory.write_u64(*at, marked.into_bits());
                }
            }
        }
        // What was used may be cached, as it stands after the walk.
        let mut rights = began;
        let mut shift = page.shift + 9 * count as u8;
        for (_, entry) in &used[..count - 1] {
            shift -= 9;
            rights &= entry.permissions();
            let cached = GuestStructure { table: Hpa::new(entry.address()), rights };
            self.caches.keep_guest_structure(ep4ta, gpa, shift, cached);
        }
        self.caches.keep_guest_translation(ep4ta, gpa, page);
        Ok(page)
    }

    /// An EPT violation invalidates what it was caused by; a misconfiguration need not.
    #[cold]
    fn ept_stop(
        &mut self,
        eptp: Eptp,
        gpa: Gpa,
        wanted: EptPermissions,
        purpose: Purpose,
        failure: Failure,
    ) -> Stop {
        let (rights, suppress_ve) = match failure {
            Failure::Misconfiguration => return Stop::Misconfiguration(gpa),
            Failure::Violation { rights, suppress_ve } => (rights, suppress_ve),
        };
        Stop::Violation(self.violation(eptp, gpa, wanted, purpose, rights, suppress_ve))
    }

    /// Builds the description of an EPT violation (SDM Vol. 3C, "Exit Qualification for EPT
    /// Violations") and drops what was cached.
    pub(crate) fn violation(
        &mut self,
        eptp: Eptp,
        gpa: Gpa,
        wanted: EptPermissions,
        purpose: Purpose,
        rights: EptPermissions,
        suppress_ve: bool,
    ) -> Violation {
        let mut qualification = EptViolation::new()
            .with_read(wanted.contains(EptPermissions::READ))
            .with_write(wanted.contains(EptPermissions::WRITE))
            .with_fetch(wanted.contains(EptPermissions::EXECUTE))
            .with_readable(rights.contains(EptPermissions::READ))
            .with_writable(rights.contains(EptPermissions::WRITE))
            .with_executable(rights.contains(EptPermissions::EXECUTE));
        let mut translated = None;
        let gva = match purpose {
            Purpose::Linear { gva, paging } => {
                qualification.set_translated(true);
                if self.caps.ept_vpid.contains(vmx_defs::msr::EptVpidCap::ADVANCED_EXIT_INFO) {
                    qualification.set_user_linear(paging.user);
                    qualification.set_linear_writable(paging.writable);
                    qualification.set_linear_execute_disabled(paging.no_execute);
                }
                translated = Some((self.space(), gva));
                Some(gva)
            }
            Purpose::Structure { gva } => Some(gva),
            Purpose::Pdptes => None,
        };
        qualification.set_linear_valid(gva.is_some());
        self.caches.ept_violation(eptp.table(), gpa, translated);
        Violation { gpa, gva, qualification, suppress_ve }
    }
}
