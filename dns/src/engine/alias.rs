//! CNAMEs and where they lead (specification 5): within the zones they are followed here, outside by whoever can
//! ask other servers.

use std::net::IpAddr;

use hickory_proto::{ProtoError, rr::RecordType};

use super::{
    Engine,
    lookup::{Content, Found, Question},
};
use crate::{directory::Directory, message, records};

impl<D: Directory> Engine<D> {
    /// What a name answers that stands for `target`. `alone`: the CNAME is worth telling even if nobody can be
    /// asked for a target outside the zones.
    pub(super) fn alias(
        &self,
        question: &Question<'_>,
        ttl: u32,
        target: &str,
        alone: bool,
    ) -> Result<Content, ProtoError> {
        let target = target.strip_suffix('.').unwrap_or(target);
        if target.parse::<IpAddr>().is_ok() {
            return Ok(Content::NoName);
        }
        let Some(target) = records::absolute(target) else { return Ok(Content::NoData) };
        let alias = records::alias(question.name, ttl, target.clone());
        match question.record_type {
            RecordType::CNAME => return Ok(Content::of(vec![alias], Vec::new())),
            RecordType::A | RecordType::AAAA => {}
            _ => return Ok(Content::NoData),
        }
        let Some(steps) = question.steps.checked_sub(1) else { return Ok(Content::NoData) };
        if target == *question.name {
            return Ok(Content::NoData);
        }
        if self.directory.zone(&message::plain_name(&target)).is_none() {
            return Ok(Content::Elsewhere { chain: vec![alias], target, alone });
        }
        let behind = Question { name: &target, steps, ..*question };
        Ok(match self.look(&behind)? {
            Found::In(_, Content::Records { mut answers, .. }) => {
                answers.insert(0, alias);
                Content::of(answers, Vec::new())
            }
            Found::In(_, Content::Elsewhere { mut chain, target, alone: behind }) => {
                chain.insert(0, alias);
                Content::Elsewhere { chain, target, alone: alone || behind }
            }
            _ => Content::NoData,
        })
    }
}
