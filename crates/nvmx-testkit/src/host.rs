//! What does L0 do for the engine? The engine's traits on a machine of the model: the VMX
//! instructions of one processor, L1's memory through EPT01, the frames of the pool, and the MSRs.

use nvmx::Tracked;
use nvmx::caps::Caps;
use nvmx::host::{
    Frames, HostError, HostResult, InvEpt, InvVpid, L1Mapping, L1Memory, MsrFault, Msrs, Vmx,
};
use vmx_defs::addr::PAGE_SIZE;
use vmx_defs::{EptPermissions, Field, Gva, Hpa, L1Gpa, msr};
use vmx_model::Machine;
use vmx_model::registers::{cr0, efer};
use vmx_model::vmx::Root;

use crate::ept01::Ept01;
use crate::frames::{self, Use};
use crate::nest::Offer;
use crate::watch::Watch;

/// A processor of the machine, as the engine and L0 see it.
pub(crate) struct Host<'a> {
    pub(crate) machine: &'a mut Machine,
    pub(crate) ept01: &'a mut Ept01,
    /// The pages that L0 sees every write to.
    pub(crate) tracked: &'a Tracked,
    pub(crate) offer: &'a Offer,
    /// Its number.
    pub(crate) processor: usize,
    pub(crate) watch: &'a Watch,
}

impl Host<'_> {
    pub(crate) fn root(&mut self) -> Root<'_> {
        self.machine.processors[self.processor].root(&mut self.machine.memory)
    }

    /// Where `length` bytes are to be written, in one page; `None` where L1 can't write, and nothing
    /// happens. What is tracked is written, and counted.
    pub(crate) fn to_write(&self, gpa: L1Gpa, length: usize) -> Option<Hpa> {
        self.tracked.about_to_write(gpa, length);
        let mapping = self.ept01.translate(&self.machine.memory, gpa);
        let may = mapping.permissions.contains(EptPermissions::WRITE);
        (may || self.tracked.contains(gpa)).then_some(mapping.hpa)
    }

    fn readable(&self, gpa: L1Gpa) -> Hpa {
        self.ept01.translate(&self.machine.memory, gpa).hpa
    }

    /// Somebody may write to what the engine reads.
    fn tamper(&mut self, gpa: L1Gpa, length: usize) {
        if !self.watch.tampers() {
            return;
        }
        let last = gpa.as_u64().saturating_add(length as u64);
        for at in (gpa.as_u64() & !7..last).step_by(8).map(L1Gpa::new) {
            if let Some(place) = self.to_write(at, length)
                && let Some(value) = self.watch.instead(self.machine.memory.read_u64(place))
            {
                self.machine.memory.write_u64(place, value);
            }
        }
    }

    /// The parts of a range that each lie in one page: (address, offset in the range, length).
    fn parts(gpa: L1Gpa, length: usize) -> impl Iterator<Item = (L1Gpa, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = L1Gpa::new(gpa.as_u64().wrapping_add(done as u64));
            let part = ((PAGE_SIZE - at.page_offset()) as usize).min(length - done);
            let offset = done;
            done += part;
            (part != 0).then_some((at, offset, part))
        })
    }
}

impl Vmx for Host<'_> {
    fn vmread(&mut self, field: Field) -> HostResult<u64> {
        self.watch.call();
        self.root().vmread(field).map_err(|_| HostError::VmRead(field))
    }

    fn vmwrite(&mut self, field: Field, value: u64) -> HostResult {
        self.watch.call();
        self.root().vmwrite(field, value).map_err(|_| HostError::VmWrite(field))
    }

    fn vmptrld(&mut self, region: Hpa) -> HostResult {
        self.watch.call();
        let given = [Use::Vmcs01, Use::Vmcs02].map(|what| frames::own(self.processor, what));
        assert!(given.contains(&region), "{region:?} is not a VMCS of this processor");
        self.root().vmptrld(region).map_err(|_| HostError::VmPtrLd(region))
    }

    fn invept(&mut self, scope: InvEpt) -> HostResult {
        self.watch.call();
        let (kind, eptp) = match scope {
            InvEpt::Single(eptp) => (1, eptp.into_bits()),
            InvEpt::All => (2, 0),
        };
        self.root().invept(kind, [eptp, 0]).map_err(|_| HostError::InvEpt)
    }

    fn invvpid(&mut self, scope: InvVpid) -> HostResult {
        self.watch.call();
        let (kind, vpid, at) = match scope {
            InvVpid::Address(vpid, at) => (0, vpid, at.as_u64()),
            InvVpid::Single(vpid) => (1, vpid, 0),
            InvVpid::All => (2, 0, 0),
            InvVpid::RetainGlobals(vpid) => (3, vpid, 0),
        };
        self.root().invvpid(kind, [vpid.into(), at]).map_err(|_| HostError::InvVpid)
    }

    fn write_cr2(&mut self, address: Gva) {
        self.watch.call();
        self.machine.processors[self.processor].regs.cr2 = address.as_u64();
    }
}

impl L1Memory for Host<'_> {
    fn read(&mut self, gpa: L1Gpa, buffer: &mut [u8]) {
        self.watch.call();
        for (at, offset, length) in Self::parts(gpa, buffer.len()) {
            let from = self.readable(at);
            self.machine.memory.read(from, &mut buffer[offset..offset + length]);
        }
        self.tamper(gpa, buffer.len());
    }

    fn write(&mut self, gpa: L1Gpa, bytes: &[u8]) {
        self.watch.call();
        for (at, offset, length) in Self::parts(gpa, bytes.len()) {
            if let Some(to) = self.to_write(at, length) {
                self.machine.memory.write(to, &bytes[offset..offset + length]);
            }
        }
    }

    fn read_u64(&mut self, gpa: L1Gpa) -> u64 {
        self.watch.call();
        assert!(gpa.is_aligned(8), "{gpa:?}");
        let value = self.machine.memory.read_u64(self.readable(gpa));
        self.tamper(gpa, 8);
        value
    }

    fn write_u64(&mut self, gpa: L1Gpa, value: u64) {
        self.watch.call();
        assert!(gpa.is_aligned(8), "{gpa:?}");
        if let Some(to) = self.to_write(gpa, 8) {
            self.machine.memory.write_u64(to, value);
        }
    }

    fn compare_exchange_u64(&mut self, gpa: L1Gpa, old: u64, new: u64) -> u64 {
        self.watch.call();
        assert!(gpa.is_aligned(8), "{gpa:?}");
        self.tamper(gpa, 8);
        let found = self.machine.memory.read_u64(self.readable(gpa));
        if found == old
            && let Some(to) = self.to_write(gpa, 8)
        {
            self.machine.memory.write_u64(to, new);
        }
        found
    }

    fn compare_exchange_u32(&mut self, gpa: L1Gpa, old: u32, new: u32) -> u32 {
        self.watch.call();
        assert!(gpa.is_aligned(4), "{gpa:?}");
        self.tamper(gpa, 4);
        let found = self.machine.memory.read_u32(self.readable(gpa));
        if found == old
            && let Some(to) = self.to_write(gpa, 4)
        {
            self.machine.memory.write_u32(to, new);
        }
        found
    }

    fn read_entries(&mut self, gpa: L1Gpa, entries: &mut [u64]) {
        self.watch.call();
        let end = gpa.page_offset() + 8 * entries.len() as u64;
        assert!(gpa.is_aligned(8) && end <= PAGE_SIZE, "{gpa:?}");
        let from = self.readable(gpa).as_u64();
        for (offset, entry) in (from..).step_by(8).zip(&mut *entries) {
            *entry = self.machine.memory.read_u64(Hpa::new(offset));
        }
        self.tamper(gpa, 8 * entries.len());
    }

    fn translate(&mut self, gpa: L1Gpa) -> L1Mapping {
        self.watch.call();
        self.ept01.translate(&self.machine.memory, gpa)
    }
}

/// Where an entry of a frame is. Only frames that the engine was given are its to use.
fn entry(frame: Hpa, index: usize) -> Hpa {
    assert!(index < 512 && frame.is_aligned(PAGE_SIZE), "{frame:?} {index}");
    assert!(frame.as_u64() < crate::frames::L1_RAM, "{frame:?} is not L0's");
    Hpa::new(frame.as_u64() + 8 * index as u64)
}

impl Frames for Host<'_> {
    fn load(&self, frame: Hpa, index: usize) -> u64 {
        self.watch.call();
        self.watch.frame(frame);
        self.machine.memory.read_u64(entry(frame, index))
    }

    fn store(&mut self, frame: Hpa, index: usize, value: u64) {
        self.watch.call();
        self.watch.frame(frame);
        self.machine.memory.write_u64(entry(frame, index), value);
    }

    fn fill(&mut self, frame: Hpa, value: u64) {
        self.watch.call();
        for index in 0..512 {
            self.store(frame, index, value);
        }
    }
}

/// The VMCS field that holds a guest's value of an MSR.
fn field_of(index: u32) -> Option<Field> {
    Some(match index {
        msr::EFER => Field::GUEST_EFER,
        msr::PAT => Field::GUEST_PAT,
        msr::DEBUGCTL => Field::GUEST_DEBUGCTL,
        msr::SYSENTER_CS => Field::GUEST_SYSENTER_CS,
        msr::SYSENTER_ESP => Field::GUEST_SYSENTER_ESP,
        msr::SYSENTER_EIP => Field::GUEST_SYSENTER_EIP,
        msr::FS_BASE => Field::GUEST_FS_BASE,
        msr::GS_BASE => Field::GUEST_GS_BASE,
        _ => return None,
    })
}

/// The MSRs that L0 answers for.
fn is_answered(index: u32) -> bool {
    matches!(index, msr::FEATURE_CONTROL | msr::VMX_BASIC..=msr::VMX_VMFUNC)
}

impl Msrs for Host<'_> {
    fn read_msr(&mut self, index: u32) -> Result<u64, MsrFault> {
        self.watch.call();
        if let Some(field) = field_of(index) {
            return self.vmread(field).map_err(|_| MsrFault);
        }
        if index == msr::FEATURE_CONTROL {
            return Ok(Caps::feature_control());
        }
        if is_answered(index) {
            return self.offer.caps.read_msr(index).ok_or(MsrFault);
        }
        self.machine.processors[self.processor].read_msr(index).ok_or(MsrFault)
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        self.watch.call();
        if let Some(field) = field_of(index) {
            let value = self.checked_value(index, value)?;
            return self.vmwrite(field, value).map_err(|_| MsrFault);
        }
        let processor = &mut self.machine.processors[self.processor];
        if !is_answered(index) && processor.write_msr(index, value) {
            Ok(())
        } else {
            Err(MsrFault)
        }
    }

    fn may_pass_read(&self, index: u32) -> bool {
        matches!(index, 0..=0x1fff | 0xc000_0000..=0xc000_1fff) && !is_answered(index)
    }

    fn may_pass_write(&self, index: u32) -> bool {
        self.may_pass_read(index)
    }
}

impl Host<'_> {
    /// Checks a value as WRMSR does, of an MSR that a field holds; returns what the field gets.
    fn checked_value(&mut self, index: u32, value: u64) -> Result<u64, MsrFault> {
        let canonical = nvmx::paging::is_canonical(value, vmx_model::caps::LINEAR_WIDTH);
        let fits = match index {
            msr::EFER => {
                let old = self.vmread(Field::GUEST_EFER).map_err(|_| MsrFault)?;
                let paging = self.vmread(Field::GUEST_CR0).map_err(|_| MsrFault)? & cr0::PG != 0;
                let moves = paging && (value ^ old) & efer::LME != 0;
                if value & !self.offer.caps.efer != 0 || moves {
                    return Err(MsrFault);
                }
                return Ok(value & !efer::LMA | old & efer::LMA);
            }
            msr::PAT => value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)),
            msr::DEBUGCTL => value & !self.offer.caps.debugctl == 0,
            msr::SYSENTER_CS => value >> 32 == 0,
            _ => canonical,
        };
        if fits { Ok(value) } else { Err(MsrFault) }
    }

    /// Fills L1's MSR bitmap (SDM Vol. 3C, "MSR-Bitmap Address").
    pub(crate) fn fill_msr_bitmap(&mut self) {
        for (first, offset) in [(0, 0), (0xc000_0000, 0x400)] {
            for low in 0..0x2000 {
                for (passes, half) in [
                    (self.may_pass_read(first + low), 0),
                    (self.may_pass_write(first + low), 0x800),
                ] {
                    if !passes {
                        let at = frames::MSR_BITMAP.as_u64() + offset + half;
                        let at = Hpa::new(at + u64::from(low / 8));
                        let byte = self.machine.memory.read_u8(at) | 1 << (low % 8);
                        self.machine.memory.write_u8(at, byte);
                    }
                }
            }
        }
    }
}
