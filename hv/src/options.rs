//! What did the user ask for on L0's own command line?

use core::fmt;

/// What happens at L2's VMFUNC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmfuncMode {
    /// The processor switches without an exit.
    Exitless,
    /// L0 switches roots at the exit.
    Emulated,
    /// As emulated, throwing every root away at each switch: the measure to compare with.
    Reload,
}

/// Every option with its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// `vmfunc=exitless|emulated|reload`.
    pub(crate) vmfunc: VmfuncMode,
    /// `console=com1|off`: whether L0 speaks on COM1.
    pub(crate) console: bool,
    /// `log=quiet|exits`: whether each exit is a line.
    pub(crate) log_exits: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { vmfunc: VmfuncMode::Exitless, console: true, log_exits: false }
    }
}

/// A word of the command line that is no option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnknownOption<'a>(pub(crate) &'a str);

impl fmt::Display for UnknownOption<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "unknown option \"{}\" (known: vmfunc=exitless|emulated|reload, console=com1|off, \
             log=quiet|exits)",
            self.0
        )
    }
}

impl Options {
    /// Reads the words of `line`; later ones win.
    ///
    /// # Errors
    /// The first word that is no option. A misspelt option would measure or log something else
    /// than was asked for, so that the caller ends the machine.
    pub(crate) fn parse(line: &str) -> Result<Self, UnknownOption<'_>> {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            match word {
                "vmfunc=exitless" => options.vmfunc = VmfuncMode::Exitless,
                "vmfunc=emulated" => options.vmfunc = VmfuncMode::Emulated,
                "vmfunc=reload" => options.vmfunc = VmfuncMode::Reload,
                "console=com1" => options.console = true,
                "console=off" => options.console = false,
                "log=quiet" => options.log_exits = false,
                "log=exits" => options.log_exits = true,
                _ => return Err(UnknownOption(word)),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_words_win_and_nothing_is_the_default() {
        assert_eq!(Options::parse(""), Ok(Options::default()));
        let options = Options::parse(" vmfunc=reload  log=exits vmfunc=emulated console=off ");
        let wanted = Options { vmfunc: VmfuncMode::Emulated, console: false, log_exits: true };
        assert_eq!(options, Ok(wanted));
    }

    #[test]
    fn an_unknown_word_is_named() {
        assert_eq!(Options::parse("log=quiet vmfunc=exit"), Err(UnknownOption("vmfunc=exit")));
        assert_eq!(Options::parse("console"), Err(UnknownOption("console")));
    }
}
