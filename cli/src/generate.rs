//! Completion scripts and man pages, made from the grammar itself. Nothing here knows which command it is for.

use std::{fs, io::Write, path::Path};

use clap::Command;
use clap_complete::Shell;

use crate::error::{Error, Result};

/// Writes the completion script of `command` for `shell`.
pub fn completion(mut command: Command, shell: Shell, out: &mut dyn Write) -> Result {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    Ok(out.write_all(&script)?)
}

/// Writes a man page for `command` and each of its subcommands to `directory`.
pub fn man_pages(command: Command, directory: &Path) -> Result {
    let failed = |source| Error::Write { path: directory.to_owned(), source };
    fs::create_dir_all(directory).map_err(failed)?;
    clap_mangen::generate_to(command, directory).map_err(failed)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn scripts_and_pages_are_made() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            completion(Cli::command(), shell, &mut script).unwrap();
            assert!(String::from_utf8(script).unwrap().contains("muster"));
        }
        let dir = tempfile::tempdir().unwrap();
        man_pages(Cli::command(), &dir.path().join("man1")).unwrap();
        let page = fs::read_to_string(dir.path().join("man1/muster-create-token.1")).unwrap();
        assert!(page.contains("reusable"));
    }
}
