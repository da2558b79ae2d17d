//! What host do the engine's unit tests run on?
//!
//! A [`TestHost`]: RAM of L1 in a `Vec`, VMCS fields in an array, frames and MSRs in maps. It
//! implements all the traits of [`crate::host`] and nothing of the processor's behaviour.

pub mod rig;

use crate::host::{
    ENTRIES, Frames, HostResult, InvEpt, InvVpid, L1Mapping, L1Memory, MsrFault, Msrs, Vmx,
};
use crate::tracking::Tracked;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use vmx_defs::ept::memory_type;
use vmx_defs::field::SLOTS;
use vmx_defs::msr;
use vmx_defs::{EptPermissions, Field, Gva, Hpa, L1Gpa};

/// A range of L1's addresses that EPT01 maps in a way of its own. What is read there stays.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Remapped {
    /// The range, of whole pages.
    pub range: Range<u64>,
    /// Real address less L1's.
    pub offset: u64,
    /// What L1 may do there.
    pub rights: EptPermissions,
}

/// RAM of L1 from address 0 on; what lies beyond reads as ones.
#[derive(Clone, Debug)]
pub struct Ram {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Stored, in order, at the first compare-exchanges to come, just before each: another
    /// processor of L1 that interferes.
    pub interference: Vec<(L1Gpa, u64)>,
    /// What L0 hides: reads as ones, swallows writes, and EPT01 has the page of ones there.
    pub hidden: Vec<Range<u64>>,
    /// What EPT01 maps in another way than by [`TestHost::HPA_OF_L1`], with all rights. Where several
    /// overlap, the first counts.
    pub remapped: Vec<Remapped>,
    /// Log2 of the size of EPT01's largest leaf: 12, 21 or 30. Blocks that overlap what is hidden or
    /// remapped have smaller ones.
    pub leaf_shift: u8,
    /// Where 8-byte reads went, in order.
    pub reads: Vec<L1Gpa>,
}

impl Ram {
    /// `size` bytes of zeros.
    pub fn new(size: usize) -> Self {
        Self {
            bytes: alloc::vec![0; size],
            interference: Vec::new(),
            hidden: Vec::new(),
            remapped: Vec::new(),
            leaf_shift: 12,
            reads: Vec::new(),
        }
    }

    fn hides(&self, address: u64, size: u64) -> bool {
        self.hidden
            .iter()
            .any(|range| address < range.end && range.start < address.saturating_add(size))
    }

    fn interfere(&mut self) {
        if !self.interference.is_empty() {
            let (gpa, value) = self.interference.remove(0);
            self.write_u64(gpa, value);
        }
    }
}

impl L1Memory for Ram {
    fn read(&mut self, gpa: L1Gpa, buffer: &mut [u8]) {
        for (at, byte) in (gpa.as_u64()..).zip(buffer) {
            let byte_there = self.bytes.get(at as usize).copied();
            *byte = byte_there.filter(|_| !self.hides(at, 1)).unwrap_or(0xff);
        }
    }

    fn write(&mut self, gpa: L1Gpa, bytes: &[u8]) {
        for (at, byte) in (gpa.as_u64()..).zip(bytes) {
            if self.hides(at, 1) {
                continue;
            }
            if let Some(slot) = self.bytes.get_mut(at as usize) {
                *slot = *byte;
            }
        }
    }

    fn read_u64(&mut self, gpa: L1Gpa) -> u64 {
        assert!(gpa.is_aligned(8));
        self.reads.push(gpa);
        let mut bytes = [0; 8];
        self.read(gpa, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn write_u64(&mut self, gpa: L1Gpa, value: u64) {
        assert!(gpa.is_aligned(8));
        self.write(gpa, &value.to_le_bytes());
    }

    fn compare_exchange_u64(&mut self, gpa: L1Gpa, old: u64, new: u64) -> u64 {
        self.interfere();
        let found = self.read_u64(gpa);
        if found == old {
            self.write_u64(gpa, new);
        }
        found
    }

    fn compare_exchange_u32(&mut self, gpa: L1Gpa, old: u32, new: u32) -> u32 {
        self.interfere();
        assert!(gpa.is_aligned(4));
        let mut bytes = [0; 4];
        self.read(gpa, &mut bytes);
        let found = u32::from_le_bytes(bytes);
        if found == old {
            self.write(gpa, &new.to_le_bytes());
        }
        found
    }

    fn read_entries(&mut self, gpa: L1Gpa, entries: &mut [u64]) {
        assert!(gpa.page_offset() + 8 * entries.len() as u64 <= 4096);
        for (at, entry) in (gpa.as_u64()..).step_by(8).zip(entries) {
            *entry = self.read_u64(L1Gpa::new(at));
        }
    }

    fn translate(&mut self, gpa: L1Gpa) -> L1Mapping {
        if self.hides(gpa.page().as_u64(), 4096) {
            return L1Mapping {
                hpa: Hpa::new(TestHost::ONES),
                permissions: EptPermissions::READ,
                memory_type: memory_type::WB,
                size_shift: 12,
            };
        }
        let page = gpa.page().as_u64();
        let found = self.remapped.iter().find(|one| one.range.contains(&page));
        let (offset, permissions) = match found {
            Some(one) => (one.offset, one.rights),
            // Another number than the guest's, so that no test passes by mixing the spaces up.
            None => (TestHost::HPA_OF_L1, EptPermissions::all()),
        };
        let fits = |shift: &u8| {
            let size = 1 << shift;
            let start = gpa.as_u64() & !(size - 1);
            let special = self
                .remapped
                .iter()
                .any(|one| one.range.start < start + size && start < one.range.end);
            *shift == 12 || *shift <= self.leaf_shift && !self.hides(start, size) && !special
        };
        L1Mapping {
            hpa: Hpa::new(offset.wrapping_add(gpa.as_u64())),
            permissions,
            memory_type: memory_type::WB,
            size_shift: [30, 21, 12].into_iter().find(fits).unwrap_or(12),
        }
    }
}

/// Something that matters in its order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// All entries of a frame were set: it begins a new life.
    Fill(Hpa),
    /// An INVEPT was executed.
    InvEpt(InvEpt),
}

/// A host for tests.
#[derive(Debug)]
pub struct TestHost {
    /// RAM of L1.
    pub ram: Ram,
    /// Regions by VMPTRLD, each with its fields by slot; region 0 is current at first.
    pub regions: BTreeMap<Hpa, Box<[u64; SLOTS]>>,
    /// Which region is current.
    pub current: Hpa,
    /// CR2.
    pub cr2: Gva,
    /// INVEPTs done.
    pub invepts: Vec<InvEpt>,
    /// INVVPIDs done.
    pub invvpids: Vec<InvVpid>,
    /// Frames of the pool.
    pub frames: BTreeMap<Hpa, Box<[u64; ENTRIES]>>,
    /// MSRs; those not here fault. IA32_EFER and IA32_PAT are fields of the current VMCS.
    pub msrs: BTreeMap<u32, u64>,
    /// What happened, in order.
    pub events: Vec<Event>,
    /// Pages whose writes are tracked.
    pub tracked: Option<Arc<Tracked>>,
    /// VMREADs done.
    pub vmreads: usize,
    /// VMWRITEs done.
    pub vmwrites: usize,
}

impl TestHost {
    /// Host-physical address of L1's address 0.
    pub const HPA_OF_L1: u64 = 1 << 36;
    /// The page of ones that EPT01 has for what L0 hides.
    pub const ONES: u64 = 0x5a_0000_0000;
    /// What a field of a region holds that [`Self::poison`] made and nobody wrote.
    pub const POISON: u64 = 0xbad0_bad0_bad0_bad0;

    /// A host with `ram` bytes of L1 memory, and zeros in every field.
    pub fn new(ram: usize) -> Self {
        Self {
            ram: Ram::new(ram),
            regions: BTreeMap::new(),
            current: Hpa::new(0),
            cr2: Gva::new(0),
            invepts: Vec::new(),
            invvpids: Vec::new(),
            frames: BTreeMap::new(),
            msrs: BTreeMap::new(),
            events: Vec::new(),
            tracked: None,
            vmreads: 0,
            vmwrites: 0,
        }
    }

    fn about_to_write(&self, gpa: L1Gpa, len: usize) {
        if let Some(tracked) = &self.tracked {
            tracked.about_to_write(gpa, len);
        }
    }

    /// Begins a region as VMCLEAR of fresh memory leaves it: no field has a known value.
    pub fn poison(&mut self, region: Hpa) {
        self.regions.insert(region, Box::new([Self::POISON; SLOTS]));
    }

    /// Value of a field of `region`, as wide as the field.
    pub fn field_of(&self, region: Hpa, field: Field) -> u64 {
        let value = self.regions.get(&region).map_or(0, |fields| fields[field.slot()]);
        value & field.width().mask()
    }

    /// Value of a field of the current region.
    pub fn field(&self, field: Field) -> u64 {
        self.field_of(self.current, field)
    }

    /// Sets a field of the current region.
    pub fn set(&mut self, field: Field, value: u64) {
        let region = self.regions.entry(self.current).or_insert_with(|| Box::new([0; SLOTS]));
        region[field.slot()] = value & field.width().mask();
    }
}

impl Vmx for TestHost {
    fn vmread(&mut self, field: Field) -> HostResult<u64> {
        self.vmreads += 1;
        Ok(self.field(field))
    }

    fn vmwrite(&mut self, field: Field, value: u64) -> HostResult {
        self.vmwrites += 1;
        self.set(field, value);
        Ok(())
    }

    fn vmptrld(&mut self, region: Hpa) -> HostResult {
        self.current = region;
        Ok(())
    }

    fn invept(&mut self, scope: InvEpt) -> HostResult {
        self.invepts.push(scope);
        self.events.push(Event::InvEpt(scope));
        Ok(())
    }

    fn invvpid(&mut self, scope: InvVpid) -> HostResult {
        self.invvpids.push(scope);
        Ok(())
    }

    fn write_cr2(&mut self, address: Gva) {
        self.cr2 = address;
    }
}

impl L1Memory for TestHost {
    fn read(&mut self, gpa: L1Gpa, buffer: &mut [u8]) {
        self.ram.read(gpa, buffer);
    }

    fn write(&mut self, gpa: L1Gpa, bytes: &[u8]) {
        self.about_to_write(gpa, bytes.len());
        self.ram.write(gpa, bytes);
    }

    fn read_u64(&mut self, gpa: L1Gpa) -> u64 {
        self.ram.read_u64(gpa)
    }

    fn write_u64(&mut self, gpa: L1Gpa, value: u64) {
        self.about_to_write(gpa, 8);
        self.ram.write_u64(gpa, value);
    }

    fn compare_exchange_u64(&mut self, gpa: L1Gpa, old: u64, new: u64) -> u64 {
        self.about_to_write(gpa, 8);
        self.ram.compare_exchange_u64(gpa, old, new)
    }

    fn compare_exchange_u32(&mut self, gpa: L1Gpa, old: u32, new: u32) -> u32 {
        self.about_to_write(gpa, 4);
        self.ram.compare_exchange_u32(gpa, old, new)
    }

    fn read_entries(&mut self, gpa: L1Gpa, entries: &mut [u64]) {
        self.ram.read_entries(gpa, entries);
    }

    fn translate(&mut self, gpa: L1Gpa) -> L1Mapping {
        self.ram.translate(gpa)
    }
}

impl Frames for TestHost {
    fn load(&self, frame: Hpa, index: usize) -> u64 {
        self.frames.get(&frame).expect("a frame is filled before it is read")[index]
    }

    fn store(&mut self, frame: Hpa, index: usize, value: u64) {
        self.frames.get_mut(&frame).expect("a frame is filled before it is written")[index] = value;
    }

    fn fill(&mut self, frame: Hpa, value: u64) {
        self.events.push(Event::Fill(frame));
        self.frames.insert(frame, Box::new([value; ENTRIES]));
    }
}

impl Msrs for TestHost {
    fn read_msr(&mut self, index: u32) -> Result<u64, MsrFault> {
        let value = self.msrs.get(&index).copied().ok_or(MsrFault)?;
        Ok(msr_field(index).map_or(value, |field| self.field(field)))
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        let slot = self.msrs.get_mut(&index).ok_or(MsrFault)?;
        match msr_field(index) {
            Some(field) => self.set(field, value),
            None => *slot = value,
        }
        Ok(())
    }

    fn may_pass_read(&self, index: u32) -> bool {
        self.msrs.contains_key(&index)
    }

    fn may_pass_write(&self, index: u32) -> bool {
        self.msrs.contains_key(&index)
    }
}

/// The field of the current VMCS that holds an MSR.
fn msr_field(index: u32) -> Option<Field> {
    match index {
        msr::EFER => Some(Field::GUEST_EFER),
        msr::PAT => Some(Field::GUEST_PAT),
        _ => None,
    }
}
