//! What becomes of an NMI that came while L0 ran, with L2 to be entered next?

use crate::engine::{Handled, Nested, Processor};
use crate::exit::ExitInfo;
use crate::host::{Host, HostError, HostResult};
use vmx_defs::controls::PinCtls;
use vmx_defs::event::{Interruptibility, IntrInfo, kind, vector};
use vmx_defs::{ExitReason, Field};

/// An NMI, as an event to inject or one that made an exit.
const NMI: IntrInfo =
    IntrInfo::new().with_vector(vector::NMI).with_kind(kind::NMI).with_valid(true);

impl Nested {
    /// Gives an NMI of L1's processor to whom it would have reached: L1, by an exit, where its VMCS
    /// asks for NMI exiting, else L2. To be called after an exit has been handled, while L2 is to be
    /// entered, and its VMCS current. `None` where that is not possible now, since the guest blocks
    /// NMIs or another event is delivered first: the host tries again after the next exit.
    ///
    /// # Errors
    /// [`HostError`]: a bug of the engine or its host; the machine can't go on.
    #[cold]
    pub fn nmi(
        &mut self,
        processor: &mut Processor,
        host: &mut impl Host,
    ) -> HostResult<Option<Handled>> {
        let pin = self.vmcs12(processor).ok_or(HostError::WrongState)?.pin();
        if IntrInfo::from(host.vmread(Field::ENTRY_INTR_INFO)? as u32).valid() {
            return Ok(None);
        }
        // With virtual NMIs the bit tells of those, which L1 injects; NMIs of the processor exit
        // whatever it is (SDM Vol. 3C, "Pin-Based VM-Execution Controls").
        let mut blocking = Interruptibility::MOV_SS | Interruptibility::STI;
        if !pin.contains(PinCtls::VIRTUAL_NMIS) {
            blocking |= Interruptibility::NMI;
        }
        let state = host.vmread(Field::GUEST_INTERRUPTIBILITY)? as u32;
        if Interruptibility::from_bits_retain(state).intersects(blocking) {
            return Ok(None);
        }
        if !pin.contains(PinCtls::NMI_EXITING) {
            host.vmwrite(Field::ENTRY_INTR_INFO, u32::from(NMI).into())?;
            return Ok(Some(Handled::Enter));
        }
        // What the last exit of the processor was delivering has been dealt with.
        let info = ExitInfo::event(ExitReason::EXCEPTION_OR_NMI, NMI);
        self.reflect(processor, host, Some(info)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::rig::{End, HOST_RIP, Rig, values, vmcs02};
    use vmx_defs::controls::{PinCtls, ProcCtls};
    use vmx_defs::{ExitReason, Field};

    const NMI: u64 = 0x8000_0202;

    /// L2 runs with these pin-based controls, having done something that L0 completed.
    fn running(pin: PinCtls) -> Rig {
        let mut rig = Rig::ready();
        let all = PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS;
        let value = values().get(Field::PIN_CTLS) & !u64::from(all.bits()) | u64::from(pin.bits());
        rig.vmwrite(0, Field::PIN_CTLS, value);
        let window = u64::from(ProcCtls::NMI_WINDOW_EXITING.bits());
        rig.vmwrite(0, Field::PROC_CTLS, values().get(Field::PROC_CTLS) & !window);
        assert_eq!(rig.launch(0), End::Entered);
        rig.host.current = vmcs02(0);
        rig.host.set(Field::EXIT_REASON, ExitReason::EPT_VIOLATION.bits().into());
        rig.host.set(Field::IDT_VECTORING_INFO, 0x8000_0030);
        rig.host.set(Field::GUEST_RIP, 0x1234);
        rig
    }

    fn nmi(rig: &mut Rig) -> Option<End> {
        rig.host.current = vmcs02(0);
        let handled = rig.nested.nmi(&mut rig.cpus[0], &mut rig.host).unwrap();
        handled.map(|handled| rig.end(0, handled))
    }

    #[test]
    fn with_nmi_exiting_l1_gets_an_exit() {
        let both = PinCtls::NMI_EXITING | PinCtls::VIRTUAL_NMIS;
        for (pin, blocking) in [(PinCtls::NMI_EXITING, 0), (both, 0), (both, 8)] {
            let mut rig = running(pin);
            rig.host.set(Field::GUEST_INTERRUPTIBILITY, blocking);
            assert_eq!(nmi(&mut rig), Some(End::Exited), "{pin:?}");
            assert_eq!(rig.l1(0, Field::GUEST_RIP), HOST_RIP);
            // As after every NMI exit.
            assert_eq!(rig.l1(0, Field::GUEST_INTERRUPTIBILITY), 8);
            for (field, value) in [
                (Field::EXIT_REASON, 0),
                (Field::EXIT_QUALIFICATION, 0),
                (Field::EXIT_INTR_INFO, NMI),
                (Field::IDT_VECTORING_INFO, 0),
                (Field::GUEST_RIP, 0x1234),
                (Field::GUEST_INTERRUPTIBILITY, blocking),
            ] {
                assert_eq!(rig.vmread(0, field), value, "{field:?}");
            }
        }
    }

    #[test]
    fn without_it_l2_gets_the_nmi() {
        let mut rig = running(PinCtls::empty());
        assert_eq!(nmi(&mut rig), Some(End::Entered));
        assert_eq!(rig.l2(0, Field::ENTRY_INTR_INFO), NMI);
    }

    #[test]
    fn it_waits_where_the_guest_blocks_it_or_another_event_comes_first() {
        for pin in [PinCtls::NMI_EXITING, PinCtls::empty()] {
            for blocking in [1, 2, 8] {
                let mut rig = running(pin);
                rig.host.set(Field::GUEST_INTERRUPTIBILITY, blocking);
                assert_eq!(nmi(&mut rig), None);
            }
            let mut rig = running(pin);
            rig.host.set(Field::ENTRY_INTR_INFO, 0x8000_0030);
            assert_eq!(nmi(&mut rig), None);
            rig.host.set(Field::ENTRY_INTR_INFO, 0x30);
            assert!(nmi(&mut rig).is_some());
        }
    }
}
