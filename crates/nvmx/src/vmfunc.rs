//! What does VMFUNC of L2 do?
//!
//! SDM Vol. 3C, "VM Functions" and "EPTP Switching". The processor itself raises #UD where VM
//! functions are disabled or EAX is 64 or more; all other leaves exit to L0, since vmcs02 enables
//! none.

use crate::engine::{Handled, Nested, Processor, VmfuncMode};
use crate::host::{Host, HostError, HostResult, L1Memory};
use crate::inject;
use crate::regs::{Gprs, RAX, RCX};
use vmx_defs::controls::VmFuncCtls;
use vmx_defs::ept::Eptp;
use vmx_defs::{Field, L1Gpa};

/// VM function 0: EPTP switching.
const EPTP_SWITCHING: u32 = 0;

impl Nested {
    /// Carries out the VMFUNC that L2 exited with, or gives L1 the exit (S7).
    #[inline]
    pub(crate) fn vmfunc(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
        gprs: &Gprs,
    ) -> HostResult<Handled> {
        let id = processor.current.ok_or(HostError::WrongState)?.id;
        let vmcs = self.vmcss.get_mut(id).ok_or(HostError::WrongState)?;
        let leaf = gprs.get(RAX) as u32;
        let enabled = vmcs.vm_functions().contains(VmFuncCtls::EPTP_SWITCHING);
        if leaf != EPTP_SWITCHING || !enabled {
            return self.reflect(processor, host, None);
        }
        // ECX, not RCX. The hints are as many as a list has entries, so that an index past its end
        // finds none.
        let number = gprs.get(RCX) as u32;
        let Some(hint) = processor.list_hints.get_mut(number as usize) else {
            return self.reflect(processor, host, None);
        };
        let list = L1Gpa::new(vmcs.get(Field::EPTP_LIST_ADDRESS));
        let eptp = list_entry(host, list, number);
        let caps = &self.config.caps;
        if !self.shadow.confirms(*hint, eptp) && !eptp.is_valid(caps.ept_vpid, caps.physical_width)
        {
            return self.reflect(processor, host, None);
        }

        let has_vpid = vmcs.has_vpid();
        let found = if self.config.vmfunc == VmfuncMode::Reload {
            self.shadow.switch_anew(host, processor.number, eptp, hint)?
        } else {
            self.shadow.switch(host, processor.number, eptp, hint)?
        };
        let Some(eptp02) = found else {
            // L2 executes its VMFUNC again.
            return Ok(Handled::Enter);
        };
        vmcs.set(Field::EPT_POINTER, eptp.into_bits());
        host.vmwrite(Field::EPT_POINTER, eptp02.into_bits())?;
        processor.vpids.switched(host, has_vpid)?;
        inject::advance_rip(host)?;
        processor.counters.switches += 1;
        Ok(Handled::Enter)
    }
}

/// Entry `number` of L1's EPTP list, read anew at each VMFUNC (S9).
#[inline]
fn list_entry(memory: &mut impl L1Memory, list: L1Gpa, number: u32) -> Eptp {
    // A list that ended past the address space would have failed the entry checks.
    let at = list.as_u64().wrapping_add(8 * u64::from(number));
    Eptp::from(memory.read_u64(L1Gpa::new(at)))
}

#[cfg(test)]
mod tests;
