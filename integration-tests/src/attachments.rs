//! Devices without a data plane that are attached to a director: they attach over real mutual TLS and say hello over
//! UDP, as agents do. For load, and for what no agent would do.

use std::{net::SocketAddr, ops::Range, path::Path, sync::Arc, time::Duration};

use muster_common::{
    frame::{self, DataHeader, Frame, HELLO, Handle, Key},
    identity::{Party, SpiffeId},
    time::Timestamp,
    tls::{ALPN_H2, Credentials, KeyPair},
};
use muster_proto::director::{
    AttachRequest, AttachResponse, Attached, attach_response::Message,
    relay_service_client::RelayServiceClient,
};
use muster_registrar::ca::Ca;
use tokio::{net::UdpSocket, sync::mpsc, task::JoinSet, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};
use uuid::Uuid;

use crate::device::Error;

/// How long certificates are valid.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Until an answer to a hello, and how often one is sent.
const ANSWER: Duration = Duration::from_millis(500);
const HELLOS: usize = 20;
/// Devices of a crowd that attach at the same time: fewer than the strangers that a director lets in from one source.
const AT_ONCE: usize = 64;

/// Issues certificates as the registrar would, with the registrar's CA.
pub struct Issuer {
    ca: Ca,
    trust_domain: String,
}

impl Issuer {
    /// With the CA in this data directory of a registrar.
    pub fn of(data: &Path, trust_domain: &str) -> Result<Self, Error> {
        Ok(Self { ca: Ca::load(data)?, trust_domain: trust_domain.to_owned() })
    }

    /// With a CA of its own, which nobody trusts, made in `directory`.
    pub fn foreign(directory: &Path, trust_domain: &str) -> Result<Self, Error> {
        let ca = Ca::create(directory, trust_domain, Timestamp::now())?;
        Ok(Self { ca, trust_domain: trust_domain.to_owned() })
    }

    /// Credentials of the party, such as `network/default/device/…`, that trust this CA.
    pub fn credentials(&self, party: &str) -> Result<Arc<Credentials>, Error> {
        let identity: SpiffeId = format!("spiffe://{}/{party}", self.trust_domain).parse()?;
        let issued = self.ca.issue_new(&identity, Timestamp::now(), LIFETIME)?;
        let pair = KeyPair::from_pem("issued", format!("{}\n{}", issued.chain, &*issued.key).as_bytes())?;
        Ok(Credentials::new(&pair, self.ca.roots())?)
    }

    /// Credentials of a device of the network `default`.
    pub fn device(&self, uid: Uuid) -> Result<Arc<Credentials>, Error> {
        self.credentials(&format!("network/default/device/{uid}"))
    }
}

/// A client of the director that has its gRPC there.
pub async fn connect(
    credentials: &Arc<Credentials>,
    director: SocketAddr,
) -> Result<RelayServiceClient<Channel>, Error> {
    let accept = |party: &Party| matches!(party, Party::Director { .. });
    let config = credentials.client_config(accept, ALPN_H2)?;
    Ok(RelayServiceClient::new(muster_common::grpc::connect(&director.to_string(), Arc::new(config)).await?))
}

/// A device's side of its attachment, which lasts as long as this.
pub struct Attachment {
    /// In every frame.
    pub session: u32,
    /// What others address the device by.
    pub handle: Handle,
    /// For hellos.
    pub key: Key,
    /// Of the last hello.
    pub counter: u64,
    responses: Streaming<AttachResponse>,
    _requests: mpsc::Sender<AttachRequest>,
}

/// What a welcome says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Frames come and go by the address that the hello came from.
    pub is_bound: bool,
    /// To be sent back unless it is so.
    pub proof: u64,
    /// The address, as the director sees it.
    pub from: SocketAddr,
}

impl Attachment {
    /// Attaches.
    pub async fn open(client: &mut RelayServiceClient<Channel>) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(1);
        let _ = requests.try_send(AttachRequest { agent_version: "test".into() });
        let mut responses = client.attach(ReceiverStream::new(receiver)).await?.into_inner();
        let Some(AttachResponse { message: Some(Message::Attached(attached)) }) = responses.message().await?
        else {
            return Err(Status::data_loss("the first message is not that the device is attached"));
        };
        let Attached { session, key, handle, .. } = attached;
        let key: [u8; 32] = key.try_into().map_err(|_| Status::data_loss("the key has not 32 octets"))?;
        let (handle, key) = (Handle(handle), Key::new(&key));
        Ok(Self { session, handle, key, counter: 0, responses, _requests: requests })
    }

    /// The next hello.
    pub fn hello(&mut self, proof: u64) -> [u8; HELLO] {
        self.counter += 1;
        frame::hello(&self.key, self.session, self.counter, proof)
    }

    /// What this datagram says, if it is a welcome for this session.
    pub fn welcome(&self, datagram: &[u8]) -> Option<Answer> {
        let Some(Frame::Welcome(welcome)) = frame::parse(datagram) else { return None };
        let is_own = welcome.session() == self.session && welcome.is_authentic(&self.key);
        let (is_bound, proof) = (welcome.flags().is_bound, welcome.proof());
        is_own.then(|| Answer { is_bound, proof, from: welcome.from() })
    }

    /// Says hello from `socket` until frames come and go there.
    pub async fn bind(&mut self, socket: &UdpSocket, director: SocketAddr) -> Result<(), Error> {
        let (mut proof, mut buffer) = (0, [0; 2048]);
        for _ in 0..HELLOS {
            let hello = self.hello(proof);
            socket.send_to(&hello, director).await?;
            while let Ok(received) = timeout(ANSWER, socket.recv_from(&mut buffer)).await {
                let (len, _) = received?;
                match self.welcome(buffer.get(..len).unwrap_or_default()) {
                    Some(Answer { is_bound: true, .. }) => return Ok(()),
                    Some(answer) => {
                        proof = answer.proof;
                        break;
                    }
                    None => {}
                }
            }
        }
        Err("the director does not answer hellos".into())
    }

    /// A frame to the device of that handle.
    pub fn frame(&self, to: Handle, message: &[u8]) -> Vec<u8> {
        [DataHeader { session: self.session, handle: to }.octets().as_slice(), message].concat()
    }

    /// Waits until the director ends the attachment; says why.
    pub async fn ended(&mut self) -> Option<Status> {
        loop {
            match self.responses.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    }
}

/// Many devices on one host, all with the same socket.
pub struct Crowd {
    members: Vec<Member>,
    socket: UdpSocket,
    director: SocketAddr,
}

struct Member {
    credentials: Arc<Credentials>,
    attachment: Option<Attachment>,
}

impl Crowd {
    /// Devices that are not attached yet.
    pub async fn new(devices: Vec<Arc<Credentials>>, director: SocketAddr) -> Result<Self, Error> {
        let unspecified = if director.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let members = devices.into_iter().map(|credentials| Member { credentials, attachment: None });
        Ok(Self { members: members.collect(), socket: UdpSocket::bind(unspecified).await?, director })
    }

    /// Ends the connections of these devices without a word to the director.
    pub fn crash(&mut self, which: Range<usize>) {
        let members = self.members.get_mut(which).unwrap_or_default();
        members.iter_mut().for_each(|member| member.attachment = None);
    }

    /// Attaches these devices, and has them say hello.
    pub async fn attach(&mut self, which: Range<usize>) -> Result<(), Error> {
        for start in which.clone().step_by(AT_ONCE) {
            let mut attaching = JoinSet::new();
            for index in start..which.end.min(start + AT_ONCE) {
                let credentials = self.members.get(index).ok_or("no such member")?.credentials.clone();
                let director = self.director;
                attaching.spawn(async move {
                    let mut client = connect(&credentials, director).await?;
                    Ok::<_, Error>((index, Attachment::open(&mut client).await?))
                });
            }
            while let Some(attached) = attaching.join_next().await {
                let (index, attachment) = attached??;
                if let Some(member) = self.members.get_mut(index) {
                    member.attachment = Some(attachment);
                }
            }
        }
        self.greet(which).await
    }

    /// Has these devices say hello until each has an answer.
    pub async fn greet(&mut self, which: Range<usize>) -> Result<(), Error> {
        let members = self.members.get_mut(which).unwrap_or_default();
        let mut waiting: std::collections::BTreeMap<u32, (&mut Attachment, u64)> = members
            .iter_mut()
            .filter_map(|member| member.attachment.as_mut())
            .map(|attachment| (attachment.session, (attachment, 0)))
            .collect();
        let mut buffer = [0; 2048];
        for _ in 0..HELLOS {
            // Few at a time, so that the answers fit into the socket.
            for group in waiting.keys().copied().collect::<Vec<_>>().chunks(AT_ONCE) {
                for session in group {
                    let Some((attachment, proof)) = waiting.get_mut(session) else { continue };
                    self.socket.send_to(&attachment.hello(*proof), self.director).await?;
                }
                let mut answers = 0;
                while answers < group.len()
                    && let Ok(received) = timeout(ANSWER, self.socket.recv_from(&mut buffer)).await
                {
                    let datagram = buffer.get(..received?.0).unwrap_or_default();
                    let Some(Frame::Welcome(welcome)) = frame::parse(datagram) else { continue };
                    let Some((attachment, proof)) = waiting.get_mut(&welcome.session()) else { continue };
                    let Some(answer) = attachment.welcome(datagram) else { continue };
                    answers += 1;
                    if answer.is_bound {
                        waiting.remove(&welcome.session());
                    } else {
                        *proof = answer.proof;
                    }
                }
            }
            if waiting.is_empty() {
                return Ok(());
            }
        }
        Err(format!("{} devices have no answer to their hellos", waiting.len()).into())
    }
}
