//! Environment variables of options: one that is empty counts as unset, whatever its option takes, and a value that is
//! refused is told with the name of its variable.
//!
//! The command is built without the variables that are empty, since clap would read an empty address or number. Help is
//! printed from the whole command: it names every variable.

use std::{env, ffi::OsString};

use clap::{
    Arg, ArgMatches, Command, CommandFactory,
    error::{ContextKind, ContextValue, ErrorKind},
};

use super::Cli;

/// Arguments that are refused, with the variable that holds them, if it is one.
pub(crate) struct Refused {
    pub(crate) error: clap::Error,
    pub(crate) variable: Option<String>,
}

/// Reads the arguments of this process.
pub(crate) fn parse() -> Result<ArgMatches, Refused> {
    parse_from(Cli::command(), &env::args_os().collect::<Vec<_>>())
}

fn parse_from(whole: Command, args: &[OsString]) -> Result<ArgMatches, Refused> {
    let used = without(whole.clone(), &is_empty);
    let error = match used.clone().try_get_matches_from(args) {
        Ok(matches) => return Ok(matches),
        Err(error) => error,
    };
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let shown = whole.try_get_matches_from(args).err();
        return Err(Refused { error: shown.unwrap_or(error), variable: None });
    }
    let variable = variable_of(used, args, &error);
    Err(Refused { error, variable })
}

/// An option as whoever set it knows it: itself, or its variable if the value came from there.
pub(crate) fn named(option: &str) -> String {
    let is_given = env::args_os().any(|arg| {
        let arg = arg.to_string_lossy();
        arg.strip_prefix(option).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    });
    let name = option.trim_start_matches('-').replace('-', "_").to_uppercase();
    let variable = format!("KEYMILL_{name}");
    let is_set = env::var_os(&variable).is_some_and(|value| !value.is_empty());
    if is_given || !is_set { option.to_owned() } else { variable }
}

/// The variable whose value `error` refuses: without it, the same option is refused no more.
fn variable_of(command: Command, args: &[OsString], error: &clap::Error) -> Option<String> {
    let option = option_of(error)?;
    // Arguments are shown as in usage lines once the command is built.
    let mut built = command.clone();
    built.build();
    let variable = find(&built, &|arg| is_set(arg) && arg.to_string() == option)?;
    let is_it = |arg: &Arg| arg.get_env().is_some_and(|name| *name == *variable);
    let again = without(command, &is_it).try_get_matches_from(args).err();
    let is_same = again.is_some_and(|again| option_of(&again).as_ref() == Some(&option));
    (!is_same).then(|| variable.to_string_lossy().into_owned())
}

/// The option whose value is refused, as usage lines show it.
fn option_of(error: &clap::Error) -> Option<String> {
    if !matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation) {
        return None;
    }
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(option)) => Some(option.clone()),
        _ => None,
    }
}

/// The name of the variable of the first argument that fits, in the command or under it.
fn find(command: &Command, fits: &dyn Fn(&Arg) -> bool) -> Option<OsString> {
    let here = command.get_arguments().find(|arg| fits(arg)).and_then(Arg::get_env);
    here.map(OsString::from)
        .or_else(|| command.get_subcommands().find_map(|command| find(command, fits)))
}

/// The same command, whose arguments that fit have no variable.
fn without(command: Command, fits: &dyn Fn(&Arg) -> bool) -> Command {
    command
        .mut_args(|arg| if fits(&arg) { arg.env(None::<&'static str>) } else { arg })
        .mut_subcommands(|command| without(command, fits))
}

fn is_set(arg: &Arg) -> bool {
    arg.get_env().and_then(env::var_os).is_some()
}

fn is_empty(arg: &Arg) -> bool {
    arg.get_env().and_then(env::var_os).is_some_and(|value| value.is_empty())
}
