//! Configuration: TOML, in which every key has a default, and every key can be set by environment.
//! Unknown keys, bad values and missing files are errors that name file, key and remedy.

use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};
use toml::{Table, Value};

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] crate::file::FileError),
    /// The file is not UTF-8 or not TOML, or has an unknown key or a value of the wrong type.
    #[error("cannot use configuration file {}: {reason}\nremedy: correct the key; `--config /dev/null --print-config` shows every key with its default", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, key and cause.
        reason: String,
    },
    /// An environment variable has a value of the wrong type.
    #[error("cannot use environment variable {variable}={value:?}: {reason}\nremedy: correct or unset it")]
    Environment {
        /// The variable.
        variable: String,
        /// Its value.
        value: String,
        /// What was expected.
        reason: String,
    },
    /// A value is of the right type but makes no sense.
    #[error("cannot use configuration key {key} = {value:?}: {reason}")]
    Value {
        /// Dotted path of the key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it and what to write.
        reason: String,
    },
}

impl ConfigError {
    /// `key` has the right type, but `value` makes no sense for `reason`.
    pub fn value(key: &'static str, value: impl ToString, reason: impl ToString) -> Self {
        Self::Value { key, value: value.to_string(), reason: reason.to_string() }
    }
}

/// Loads `T` from `path` (the defaults alone, if `None`), then from the environment: key `a.b` is variable
/// `MUSTER_A_B`. Lists are comma-separated there.
///
/// `T` must be `#[serde(default, deny_unknown_fields)]` throughout, and must not use `Option`: an empty value
/// stands for none, so that every key is visible in [`print`].
pub fn load<T: DeserializeOwned + Serialize + Default>(path: Option<&Path>) -> Result<T, ConfigError> {
    load_with(path, |variable| std::env::var(variable).ok())
}

/// As [`load`], with the environment given.
pub fn load_with<T: DeserializeOwned + Serialize + Default>(
    path: Option<&Path>,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<T, ConfigError> {
    let mut table = match path {
        None => Table::new(),
        Some(path) => {
            let invalid = |reason: String| ConfigError::Invalid { path: path.to_owned(), reason };
            let text = String::from_utf8(crate::file::read(path)?).map_err(|e| invalid(e.to_string()))?;
            // First as `T`, which names line and key of anything wrong.
            toml::from_str::<T>(&text).map_err(|e| invalid(e.to_string()))?;
            toml::from_str(&text).map_err(|e| invalid(e.to_string()))?
        }
    };
    let mut overridden = None;
    overlay(&mut table, &defaults::<T>(), "MUSTER", &environment, &mut overridden)?;
    T::deserialize(Value::Table(table)).map_err(|e| match (path, overridden) {
        (_, Some((variable, value))) => ConfigError::Environment { variable, value, reason: e.to_string() },
        (path, None) => ConfigError::Invalid {
            path: path.unwrap_or(Path::new("(defaults)")).to_owned(),
            reason: e.to_string(),
        },
    })
}

/// `config` as TOML, every key with its value.
pub fn print<T: Serialize>(config: &T) -> String {
    toml::to_string_pretty(config).unwrap_or_else(|e| format!("# cannot print: {e}\n"))
}

/// `config` as TOML, with those keys alone whose values differ from their defaults.
pub fn print_changed<T: Serialize + Default>(config: &T) -> String {
    let mut table = Table::try_from(config).unwrap_or_default();
    drop_same(&mut table, &defaults::<T>());
    toml::to_string_pretty(&table).unwrap_or_else(|e| format!("# cannot print: {e}\n"))
}

/// Removes from `table` what is in `others` as well.
fn drop_same(table: &mut Table, others: &Table) {
    for (key, other) in others {
        match (table.get_mut(key), other) {
            (Some(Value::Table(inner)), Value::Table(other)) => {
                drop_same(inner, other);
                if inner.is_empty() {
                    table.remove(key);
                }
            }
            (Some(value), other) if value == other => drop(table.remove(key)),
            _ => {}
        }
    }
}

/// Reads `T` from TOML that came from elsewhere than a file, without the environment.
///
/// # Errors
/// What is wrong with it: line, key and cause.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    toml::from_str(text).map_err(|error| error.to_string())
}

fn defaults<T: Serialize + Default>() -> Table {
    Table::try_from(T::default()).unwrap_or_default()
}

/// Sets in `table` every key of `defaults` that the environment has, keeping the type of the default.
fn overlay(
    table: &mut Table,
    defaults: &Table,
    prefix: &str,
    environment: &dyn Fn(&str) -> Option<String>,
    overridden: &mut Option<(String, String)>,
) -> Result<(), ConfigError> {
    for (key, default) in defaults {
        let variable = format!("{prefix}_{}", key.to_uppercase().replace('-', "_"));
        if let Value::Table(inner_defaults) = default {
            let inner = table.entry(key).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(inner) = inner {
                overlay(inner, inner_defaults, &variable, environment, overridden)?;
            }
            continue;
        }
        let Some(text) = environment(&variable) else { continue };
        let wrong = |reason: String| ConfigError::Environment {
            variable: variable.clone(),
            value: text.clone(),
            reason,
        };
        let value = match default {
            Value::Integer(_) => Value::Integer(text.parse().map_err(|e| wrong(format!("{e}")))?),
            Value::Float(_) => Value::Float(text.parse().map_err(|e| wrong(format!("{e}")))?),
            Value::Boolean(_) => Value::Boolean(text.parse().map_err(|e| wrong(format!("{e}")))?),
            Value::Array(_) => Value::Array(
                text.split(',')
                    .map(str::trim)
                    .filter(|item| !item.is_empty())
                    .map(|item| Value::String(item.to_owned()))
                    .collect(),
            ),
            _ => Value::String(text.clone()),
        };
        *overridden = Some((variable, text));
        table.insert(key.clone(), value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Serialize, Deserialize, Debug, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Sample {
        listen: String,
        workers: u16,
        dns: Dns,
    }

    #[derive(Serialize, Deserialize, Debug, PartialEq, Default)]
    #[serde(default, deny_unknown_fields)]
    struct Dns {
        servers: Vec<String>,
        verbose: bool,
    }

    impl Default for Sample {
        fn default() -> Self {
            Self { listen: "[::]:1".into(), workers: 2, dns: Dns::default() }
        }
    }

    fn load_text(text: &str, environment: &[(&str, &str)]) -> Result<Sample, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        load_with(Some(&path), |v| environment.iter().find(|(k, _)| *k == v).map(|(_, x)| (*x).to_owned()))
    }

    #[test]
    fn the_environment_wins_over_the_file_and_the_file_over_defaults() {
        let loaded =
            load_text("workers = 3\n", &[("MUSTER_LISTEN", "x:2"), ("MUSTER_DNS_SERVERS", "a, b")]).unwrap();
        let dns = Dns { servers: vec!["a".into(), "b".into()], verbose: false };
        assert_eq!(loaded, Sample { listen: "x:2".into(), workers: 3, dns });
    }

    #[test]
    fn errors_name_file_key_and_remedy() {
        let error = load_text("[dns]\nservrs = []\n", &[]).unwrap_err().to_string();
        assert!(error.contains("c.toml") && error.contains("servrs") && error.contains("remedy"), "{error}");
        let error = load_text("", &[("MUSTER_WORKERS", "many")]).unwrap_err().to_string();
        assert!(error.contains("MUSTER_WORKERS") && error.contains("many"), "{error}");
        let error = load_text("", &[("MUSTER_WORKERS", "70000")]).unwrap_err().to_string();
        assert!(error.contains("MUSTER_WORKERS"), "{error}");
        let error = load_with::<Sample>(Some(Path::new("/none.toml")), |_| None).unwrap_err().to_string();
        assert!(error.contains("/none.toml"), "{error}");
    }

    #[test]
    fn what_is_printed_loads_again() {
        let printed = print(&Sample::default());
        assert_eq!(load_text(&printed, &[]).unwrap(), Sample::default());
    }

    #[test]
    fn what_has_been_changed_prints_alone() {
        assert_eq!(print_changed(&Sample::default()), "");
        let dns = Dns { servers: vec!["a".into()], verbose: false };
        let changed = Sample { workers: 3, dns, ..Sample::default() };
        let printed = print_changed(&changed);
        assert!(!printed.contains("listen") && !printed.contains("verbose"), "{printed}");
        assert_eq!(parse::<Sample>(&printed).unwrap(), changed);
        assert!(parse::<Sample>("workrs = 1\n").unwrap_err().contains("workrs"));
    }
}
