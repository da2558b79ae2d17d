//! What does L0 do for the engine? Here it implements the engine's traits: the processor's VMX
//! instructions, L1's memory through the direct map, the frames of the pool, and the MSRs.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use nvmx::host::{
    ENTRIES, Frames, HostResult, InvEpt, InvVpid, L1Mapping, L1Memory, MsrFault, Msrs, Vmx,
};
use nvmx::paging::AddressSizes;
use vmx_defs::{Field, Gva, Hpa, L1Gpa};
use vmx_hw::Cpu;

use crate::guest_msr;
use crate::machine::Machine;
use crate::phys::{PAGE, Span, direct};

/// Compares two entries for [`Host::differ_by`]: a bit of `all` is cleared where they differ by
/// anything else.
macro_rules! differ_by {
    ($at:literal) => {
        concat!(
            "movdqa {two}, [{theirs} + {left} + ",
            $at,
            "]\n",
            "pxor {two}, [{ours} + {left} + ",
            $at,
            "]\n",
            "pcmpeqd {two}, {by}\n",
            "pand {all}, {two}"
        )
    };
}

/// One processor, as the engine sees it.
#[derive(Debug)]
pub(crate) struct Host {
    /// Its VMX instructions.
    pub(crate) cpu: Cpu,
    /// The machine.
    pub(crate) machine: &'static Machine,
    /// What L1 last wrote to IA32_APIC_BASE.
    pub(crate) apic_base: u64,
    /// L1 wrote an MTRR: EPT01 is to follow.
    pub(crate) memory_types_changed: bool,
}

impl Vmx for Host {
    #[inline]
    fn vmread(&mut self, field: Field) -> HostResult<u64> {
        self.cpu.vmread(field)
    }

    #[inline]
    fn vmwrite(&mut self, field: Field, value: u64) -> HostResult {
        self.cpu.vmwrite(field, value)
    }

    #[inline]
    fn vmptrld(&mut self, region: Hpa) -> HostResult {
        self.cpu.vmptrld(region)
    }

    #[inline]
    fn invept(&mut self, scope: InvEpt) -> HostResult {
        self.cpu.invept(scope)
    }

    #[inline(always)]
    fn invvpid(&mut self, scope: InvVpid) -> HostResult {
        self.cpu.invvpid(scope)
    }

    #[inline]
    fn write_cr2(&mut self, address: Gva) {
        self.cpu.write_cr2(address);
    }
}

impl Host {
    /// Where L0 sees `len` bytes of L1's RAM; `None` if they are not all RAM of L1. EPT01 maps
    /// RAM to itself.
    #[inline]
    fn ram<T>(&self, gpa: L1Gpa, len: u64) -> Option<*mut T> {
        let span = Span::sized(gpa.as_u64(), len)?;
        self.machine.is_ram(span).then(|| direct(span.start))
    }

    /// What CPUID tells L1 about addresses.
    pub(crate) fn sizes(&self) -> AddressSizes {
        self.machine.sizes
    }

    /// The parts of a range that each lie in one page: (address, offset in the range, length).
    fn parts(gpa: L1Gpa, len: usize) -> impl Iterator<Item = (L1Gpa, usize, usize)> {
        let mut done = 0;
        core::iter::from_fn(move || {
            let at = L1Gpa::new(gpa.as_u64().wrapping_add(done as u64));
            let part = ((PAGE - at.page_offset()) as usize).min(len - done);
            let offset = done;
            done += part;
            (part != 0).then_some((at, offset, part))
        })
    }

    /// Where L0 sees entry `index` of a frame of its own.
    ///
    /// # Panics
    /// If the frame is not L0's: a bug of the engine.
    #[inline]
    fn entry(&self, frame: Hpa, index: usize) -> *mut u64 {
        let address = frame.as_u64() + (index % ENTRIES) as u64 * 8;
        let own = self.machine.own;
        assert!(address.wrapping_sub(own.start) < own.len(), "a frame that is not L0's");
        direct(address)
    }
}

impl L1Memory for Host {
    fn read(&mut self, gpa: L1Gpa, buffer: &mut [u8]) {
        for (at, offset, len) in Self::parts(gpa, buffer.len()) {
            let Some(to) = buffer.get_mut(offset..offset + len) else { return };
            match self.ram::<u8>(at, len as u64) {
                // SAFETY: the source is RAM of L1 in the direct map, where no Rust object lives; a
                // byte that L1 writes meanwhile is old or new.
                Some(from) => unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), len) },
                None => to.fill(0xFF),
            }
        }
    }

    fn write(&mut self, gpa: L1Gpa, bytes: &[u8]) {
        self.machine.tracked.about_to_write(gpa, bytes.len());
        for (at, offset, len) in Self::parts(gpa, bytes.len()) {
            let Some(from) = bytes.get(offset..offset + len) else { return };
            if let Some(to) = self.ram::<u8>(at, len as u64) {
                // SAFETY: the target is RAM of L1 in the direct map, where no Rust object lives.
                unsafe { to.copy_from_nonoverlapping(from.as_ptr(), len) };
            }
        }
    }

    #[inline]
    fn read_u64(&mut self, gpa: L1Gpa) -> u64 {
        match self.ram::<AtomicU64>(gpa, 8) {
            // SAFETY: aligned, as the trait demands, and RAM of L1 in the direct map.
            Some(at) if at.is_aligned() => unsafe { &*at }.load(Ordering::Relaxed),
            _ => u64::MAX,
        }
    }

    #[inline]
    fn write_u64(&mut self, gpa: L1Gpa, value: u64) {
        self.machine.tracked.about_to_write(gpa, 8);
        match self.ram::<AtomicU64>(gpa, 8) {
            // SAFETY: aligned, as the trait demands, and RAM of L1 in the direct map.
            Some(at) if at.is_aligned() => unsafe { &*at }.store(value, Ordering::Relaxed),
            _ => {}
        }
    }

    fn compare_exchange_u64(&mut self, gpa: L1Gpa, old: u64, new: u64) -> u64 {
        self.machine.tracked.about_to_write(gpa, 8);
        match self.ram::<AtomicU64>(gpa, 8) {
            Some(at) if at.is_aligned() => {
                // SAFETY: aligned, and RAM of L1 in the direct map.
                let cell = unsafe { &*at };
                let (Ok(was) | Err(was)) =
                    cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst);
                was
            }
            _ => u64::MAX,
        }
    }

    fn compare_exchange_u32(&mut self, gpa: L1Gpa, old: u32, new: u32) -> u32 {
        self.machine.tracked.about_to_write(gpa, 4);
        match self.ram::<AtomicU32>(gpa, 4) {
            Some(at) if at.is_aligned() => {
                // SAFETY: aligned, and RAM of L1 in the direct map.
                let cell = unsafe { &*at };
                let (Ok(was) | Err(was)) =
                    cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst);
                was
            }
            _ => u32::MAX,
        }
    }

    fn read_entries(&mut self, gpa: L1Gpa, entries: &mut [u64]) {
        match self.ram::<u64>(gpa, size_of_val(entries) as u64) {
            Some(from) if from.is_aligned() => {
                // SAFETY: a range of RAM of L1 in the direct map, and as many quadwords of ours. An
                // aligned string move reads each quadword in one access.
                unsafe {
                    asm!("rep movsq", inout("rcx") entries.len() => _, inout("rsi") from => _,
                         inout("rdi") entries.as_mut_ptr() => _, options(nostack, preserves_flags));
                }
            }
            _ => entries.fill(u64::MAX),
        }
    }

    fn differ_by(&mut self, gpa: L1Gpa, frame: Hpa, first: usize, eights: usize, by: u64) -> usize {
        // Two entries at a time.
        let theirs = self.ram::<u128>(gpa, eights as u64 * 64).filter(|at| at.is_aligned());
        let ours = self.entry(frame, first).cast::<u128>();
        let ends_in_frame = first < ENTRIES && eights <= (ENTRIES - first) / 8;
        let (Some(theirs), true, true) = (theirs, ours.is_aligned(), ends_in_frame) else {
            return 0;
        };
        // Counts up to the ends, so that one addition moves in both tables.
        let mut left = (eights as u64 * 64).wrapping_neg();
        let ours_end = (ours as u64).wrapping_sub(left);
        let theirs_end = (theirs as u64).wrapping_sub(left);
        // SAFETY: both ranges are aligned: RAM of L1 in the direct map, and the part of a frame that
        // `entry` let pass. An aligned move reads each quadword in one access.
        unsafe {
            asm!(
                "movq {by}, {by_one}",
                "punpcklqdq {by}, {by}",
                "test {left}, {left}",
                "jz 3f",
                "2:",
                "pcmpeqd {all}, {all}",
                differ_by!("0"),
                differ_by!("16"),
                differ_by!("32"),
                differ_by!("48"),
                "pmovmskb {mask:e}, {all}",
                "cmp {mask:e}, 0xFFFF",
                "jne 3f",
                "add {left}, 64",
                "jnz 2b",
                "3:",
                theirs = in(reg) theirs_end,
                ours = in(reg) ours_end,
                left = inout(reg) left,
                by_one = in(reg) by,
                mask = out(reg) _,
                by = out(xmm_reg) _,
                all = out(xmm_reg) _,
                two = out(xmm_reg) _,
                options(nostack, readonly),
            );
        }
        eights - (left.wrapping_neg() / 64) as usize
    }

    fn translate(&mut self, gpa: L1Gpa) -> L1Mapping {
        self.machine.ept01.lock().translate(gpa)
    }
}

impl Frames for Host {
    #[inline]
    fn load(&self, frame: Hpa, index: usize) -> u64 {
        // SAFETY: `entry` answers only for L0's own memory, and the frames there that the engine
        // knows hold no Rust object.
        unsafe { self.entry(frame, index).read_volatile() }
    }

    #[inline]
    fn store(&mut self, frame: Hpa, index: usize, value: u64) {
        // SAFETY: as in `load`.
        unsafe { self.entry(frame, index).write_volatile(value) };
    }

    fn fill(&mut self, frame: Hpa, value: u64) {
        let start = self.entry(frame.page(), 0);
        // SAFETY: `entry` answers only for L0's own memory, and it is a whole page.
        unsafe {
            asm!("rep stosq", inout("rcx") ENTRIES => _, inout("rdi") start => _, in("rax") value,
                 options(nostack, preserves_flags));
        }
    }
}

impl Msrs for Host {
    fn read_msr(&mut self, index: u32) -> Result<u64, MsrFault> {
        guest_msr::read(self, index)
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        guest_msr::write(self, index, value)
    }

    fn may_pass_read(&self, index: u32) -> bool {
        guest_msr::may_pass_read(index)
    }

    fn may_pass_write(&self, index: u32) -> bool {
        guest_msr::may_pass_write(index)
    }
}
