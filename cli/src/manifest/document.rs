//! The documents of a file as JSON values. What a file grows to is bounded by what it says itself: aliases in YAML
//! could make gigabytes of a few lines. A key that is there twice is an error.

use std::{cell::Cell, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::ManifestError;

/// By how much aliases may make a file larger, in octets.
const ALIASES_MAX: usize = 1 << 20;
/// Most brackets that are open at once. The time to read YAML grows with their square.
const OPEN_MAX: usize = 4_000;

/// The documents of `text`: JSON if it begins like JSON, else YAML.
pub(super) fn documents(name: &str, text: &str) -> Result<Vec<Value>, ManifestError> {
    let syntax = |i: usize, format, reason: String| ManifestError::Syntax {
        place: if i > 0 { format!("{name}, document {}", i + 1) } else { name.to_owned() },
        format,
        reason,
    };
    let left = Cell::new(text.len().saturating_add(ALIASES_MAX));
    let reader = Reader { left: &left };
    if text.trim_start().starts_with('{') {
        let mut json = serde_json::Deserializer::from_str(text);
        let mut documents = Vec::new();
        while json.end().is_err() {
            let i = documents.len();
            let document = reader.deserialize(&mut json).map_err(|e| syntax(i, "JSON", e.to_string()))?;
            documents.push(document);
        }
        return Ok(documents);
    }
    if opens_too_much(text) {
        let reason = format!("more than {OPEN_MAX} brackets are opened and not closed");
        return Err(syntax(0, "YAML", reason));
    }
    let stream = serde_yaml_ng::Deserializer::from_str(text).enumerate();
    stream.map(|(i, d)| reader.deserialize(d).map_err(|e| syntax(i, "YAML", e.to_string()))).collect()
}

/// Whether so many brackets are open at once that no manifest can mean it, wherever they stand.
fn opens_too_much(text: &str) -> bool {
    let mut open = 0_usize;
    text.bytes().any(|byte| {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        open > OPEN_MAX
    })
}

/// Reads a value of no more than what is left.
#[derive(Clone, Copy)]
struct Reader<'a> {
    /// In octets.
    left: &'a Cell<usize>,
}

impl Reader<'_> {
    fn spend<E: Error>(self, octets: usize) -> Result<(), E> {
        let too_large =
            || E::custom("its aliases make it too large; write out what they stand for, once each");
        let left = self.left.get().checked_sub(octets).ok_or_else(too_large)?;
        self.left.set(left);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plain value, list or map")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.spend(1).map(|()| value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.spend(1).map(|()| value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.spend(1).map(|()| value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.spend(1).map(|()| value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.spend(value.len()).map(|()| value.into())
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            self.spend(1)?;
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            self.spend(key.len())?;
            if map.contains_key(&key) {
                let short: String = key.chars().take(80).collect();
                return Err(A::Error::custom(format!("{short:?} is there twice; remove one")));
            }
            let value = entries.next_value_seed(self)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_and_brackets_are_bounded() {
        let many = |what: &str| [what; 20_000].join(", ");
        let bomb = format!("a: &a [{}]\nb: [{}]\n", many("x"), many("*a"));
        let error = documents("f", &bomb).unwrap_err().to_string();
        assert!(error.contains("aliases"), "{error}");
        let error = documents("f", &format!("a: {}", "[".repeat(100_000))).unwrap_err().to_string();
        assert!(error.contains("brackets"), "{error}");
        let text = "a: &a {x: 1, n: null, f: 1.5, m: -1}\nb: *a\n---\n1: [true, '', ~]\n";
        let expected = serde_json::json!({"x": 1, "n": null, "f": 1.5, "m": -1});
        assert_eq!(
            documents("f", text).unwrap(),
            [serde_json::json!({"a": expected, "b": expected}), serde_json::json!({"1": [true, "", null]})]
        );
        // However dense, a file without aliases is read.
        let dense = format!("[{}0]", "0,".repeat(2_000_000));
        assert!(documents("f", &format!("{{\"a\":{dense}}}")).is_ok());
    }

    #[test]
    fn a_key_that_is_there_twice_is_an_error() {
        for text in ["a: 1\nb: 2\na: 3\n", "{\"a\": 1, \"a\": 2}"] {
            let error = documents("f", text).unwrap_err().to_string();
            assert!(error.contains("\"a\" is there twice"), "{error}");
        }
        assert_eq!(documents("f", "{\"a\": 1}\n{\"a\": 2} ").unwrap().len(), 2);
        assert!(documents("f", "{\"a\": 1}, 2").is_err());
    }
}
