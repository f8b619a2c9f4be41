//! Zone transfer (specification 14; RFC 5936, RFC 1995): who may have it, what is in it and in which order, cut
//! into messages as they are fetched.

use std::{collections::VecDeque, sync::Arc};

use hickory_proto::{
    ProtoError,
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType},
};

use super::{
    Engine, Outcome, QueryContext,
    external::external_addresses,
    lookup::{Place, within},
    services::protocol_label,
    write,
};
use crate::{
    directory::{Directory, Service, ServiceKind, Viewer},
    message::{self, Parsed, Request, Response, Transport},
    records,
};

/// Records of a message: so few that they fit without compression, whatever they are (526 octets each at most).
const RECORDS: usize = 100;
/// Weight of SRV records of Services with a cluster IP.
const WEIGHT: u16 = 100;

/// A zone on its way to a client: its messages, one after another.
#[derive(Debug)]
pub struct Transfer {
    request: Request,
    ready: VecDeque<Record>,
    place: Place,
    services: std::vec::IntoIter<Arc<Service>>,
    /// The SOA that ends the transfer, until it is sent.
    end: Option<Record>,
    show: Show,
}

/// Of the options, what decides which records there are.
#[derive(Clone, Copy, Debug)]
struct Show {
    endpoints: bool,
    device_names: bool,
    external_headless: bool,
}

impl Transfer {
    /// Writes the next message over `out`; `None` if all have been written. A response that is not NOERROR
    /// ends the transfer.
    pub fn next_message(&mut self, out: &mut Vec<u8>) -> Option<Outcome> {
        out.clear();
        let response = match self.fill() {
            Ok(None) => return None,
            Ok(Some(response)) => response,
            Err(error) => {
                tracing::debug!(%error, "cannot make a record of a zone transfer");
                self.ready.clear();
                self.services = Vec::new().into_iter();
                self.end = None;
                self.request.response(ResponseCode::ServFail)
            }
        };
        Some(write(&response, u16::MAX, out))
    }

    fn fill(&mut self) -> Result<Option<Response>, ProtoError> {
        while self.ready.len() < RECORDS {
            let Some(service) = self.services.next() else {
                self.ready.extend(self.end.take());
                break;
            };
            if self.place.external {
                self.external(&service)?;
            } else {
                self.service(&service)?;
            }
        }
        if self.ready.is_empty() {
            return Ok(None);
        }
        let mut response = self.request.response(ResponseCode::NoError);
        response.metadata.authoritative = true;
        response.answers = self.ready.drain(..self.ready.len().min(RECORDS)).collect();
        Ok(Some(response))
    }

    /// Adds the records of one Service in the domain.
    fn service(&mut self, service: &Service) -> Result<(), ProtoError> {
        let ttl = self.place.ttl();
        let base = records::service_name(service, &self.place.origin)?;
        match &service.kind {
            ServiceKind::ExternalName(target) => {
                if target.parse::<std::net::IpAddr>().is_err() {
                    let target = records::absolute(target);
                    self.ready.extend(target.map(|target| records::alias(&base, ttl, target)));
                }
            }
            ServiceKind::ClusterIp(addresses) => {
                self.ready.extend(addresses.iter().map(|address| records::address(&base, ttl, *address)));
                self.ports(service, &base, &base)?;
            }
            ServiceKind::Headless => self.endpoints(service, &base)?,
        }
        Ok(())
    }

    /// Adds SRV of every port, and of every named one under its name.
    fn ports(&mut self, service: &Service, base: &Name, target: &Name) -> Result<(), ProtoError> {
        let ttl = self.place.ttl();
        for port in &service.ports {
            self.ready.push_back(records::service(base, ttl, WEIGHT, port.number, target.clone()));
            if !port.name.is_empty() {
                let labels = [format!("_{}", port.name), format!("_{}", protocol_label(port.protocol))];
                let owner = records::below(&[&labels[0], &labels[1]], base)?;
                self.ready.push_back(records::service(&owner, ttl, WEIGHT, port.number, target.clone()));
            }
        }
        Ok(())
    }

    /// Adds the endpoints of a headless Service. Those that share a list of ports are of one slice.
    fn endpoints(&mut self, service: &Service, base: &Name) -> Result<(), ProtoError> {
        if !self.show.endpoints {
            return Ok(());
        }
        let ttl = self.place.ttl();
        let mut slices: Vec<(*const (), usize)> = Vec::new();
        let slice = |endpoint: &crate::directory::Endpoint| Arc::as_ptr(&endpoint.ports).cast::<()>();
        for endpoint in &service.endpoints {
            match slices.iter_mut().find(|(known, _)| *known == slice(endpoint)) {
                Some((_, count)) => *count += 1,
                None => slices.push((slice(endpoint), 1)),
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        for endpoint in &service.endpoints {
            let count = slices.iter().find(|(known, _)| *known == slice(endpoint)).map_or(1, |(_, n)| *n);
            let label = super::endpoints::label(endpoint, self.show.device_names);
            let name = records::below(&[&label], base)?;
            let mut add = vec![
                records::address(base, ttl, endpoint.address),
                records::address(&name, ttl, endpoint.address),
            ];
            for port in endpoint.ports.iter().filter(|port| !port.name.is_empty()) {
                let labels = [format!("_{}", port.name), format!("_{}", protocol_label(port.protocol))];
                let owner = records::below(&[&labels[0], &labels[1]], base)?;
                let weight = records::weight(count);
                add.push(records::service(&owner, ttl, weight, port.number, name.clone()));
            }
            // Equal records appear once.
            self.ready.extend(add.into_iter().filter(|record| seen.insert(record.to_string())));
        }
        Ok(())
    }

    /// Adds the records of one Service in the external zone.
    fn external(&mut self, service: &Service) -> Result<(), ProtoError> {
        let ttl = self.place.ttl();
        let base = records::external_name(service, &self.place.origin)?;
        let (addresses, host) = external_addresses(service);
        if let Some(host) = host {
            let target = records::absolute(host);
            self.ready.extend(target.map(|target| records::alias(&base, ttl, target)));
        } else if !addresses.is_empty() {
            self.ready.extend(addresses.into_iter().map(|address| records::address(&base, ttl, address)));
            self.ports(service, &base, &base)?;
        } else if self.show.external_headless && service.kind == ServiceKind::Headless {
            self.endpoints(service, &base)?;
        }
        Ok(())
    }
}

impl<D: Directory> Engine<D> {
    /// The transfer that `query` asks for and its client is allowed, to be sent message by message over the
    /// stream it came on. `None` for every other query, also for one that is refused: [`Engine::begin`] answers
    /// those.
    pub fn transfer(&self, query: &[u8], context: &QueryContext) -> Option<Transfer> {
        let Parsed::Request(request) = message::parse(query) else { return None };
        if !is_transfer(&request) {
            return None;
        }
        self.start(&request, query, context).ok()?.ok()
    }

    /// The response to a query for a transfer, if it is a single message.
    pub(super) fn transfer_in_one(
        &self,
        request: &Request,
        query: &[u8],
        context: &QueryContext,
    ) -> Result<Response, ProtoError> {
        let mut transfer = match self.start(request, query, context)? {
            Ok(transfer) => transfer,
            Err(code) => return Ok(request.response(code)),
        };
        match (transfer.fill()?, transfer.fill()?) {
            (Some(response), None) => Ok(response),
            _ => Ok(request.response(ResponseCode::ServFail)),
        }
    }

    /// Begins a transfer, or says why not.
    fn start(
        &self,
        request: &Request,
        query: &[u8],
        context: &QueryContext,
    ) -> Result<Result<Transfer, ResponseCode>, ProtoError> {
        let refused = Ok(Err(ResponseCode::Refused));
        let peers = &self.options.transfer_to;
        let listed = context.source.is_some_and(|source| peers.iter().any(|net| net.contains(&source)));
        if !listed || context.transport == Transport::Udp {
            return refused;
        }
        let text = message::plain_name(&request.question.name);
        let Some(zone) = self.directory.zone(&text) else { return refused };
        let Some(("", external)) = within(&zone, &text) else { return refused };
        if !self.directory.is_loaded() {
            return Ok(Err(ResponseCode::ServFail));
        }
        let apex = request.question.name.clone();
        let place = Place { zone, apex: apex.clone(), origin: apex, external };
        let soa = place.soa()?;
        let serial = if external { place.zone.external_serial } else { place.zone.serial };
        let mut ready = VecDeque::from([soa.clone()]);
        let (mut services, mut end) = (Vec::new(), None);
        let known = match request.record_type() {
            RecordType::IXFR => match serial_of(query, &request.question.name) {
                Some(serial) => Some(serial),
                None => return Ok(Err(ResponseCode::ServFail)),
            },
            _ => None,
        };
        // Current is also what is newer than ours, in serial number arithmetic (RFC 1982).
        if known.is_none_or(|known| known.wrapping_sub(serial).cast_signed() < 0) {
            let (servers, glue) = self.name_servers(&place)?;
            ready.extend(servers);
            ready.extend(glue);
            // The list of peers says who sees all of it.
            services = self.directory.services(&place.zone, &Viewer::Open);
            services.retain(|service| {
                self.serves(&place.zone, service.namespace.as_str()) && (external || !self.hides(service))
            });
            end = Some(soa);
        }
        let show = Show {
            endpoints: self.options.endpoints,
            device_names: self.options.endpoint_device_names,
            external_headless: self.options.external_headless,
        };
        let services = services.into_iter();
        Ok(Ok(Transfer { request: request.clone(), ready, place, services, end, show }))
    }
}

fn is_transfer(request: &Request) -> bool {
    matches!(request.record_type(), RecordType::AXFR | RecordType::IXFR)
}

/// The serial in the Authority section of an IXFR query.
fn serial_of(query: &[u8], apex: &Name) -> Option<u32> {
    let message = Message::from_vec(query).ok()?;
    message.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) if record.name == *apex => Some(soa.serial),
        _ => None,
    })
}
