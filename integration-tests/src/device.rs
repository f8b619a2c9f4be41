//! Devices without a data plane: they join and call the registrar as an agent does, over real mutual TLS. For
//! load, and for calls that no agent would make.

use std::{path::Path, sync::Arc};

use muster_common::{
    credential::OperatorCredential,
    grpc,
    identity::Party,
    tls::{ALPN_H2, Credentials, KeyPair, SpkiHash, pinned_client_config},
};
use muster_proto::{
    admin::Endpoint,
    enrollment::{EnrollRequest, EnrollResponse, enrollment_service_client::EnrollmentServiceClient},
    registration::{RegisterRequest, registration_service_client::RegistrationServiceClient},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tonic::transport::Channel;

use crate::muster::JoinCommand;

/// What went wrong with a device's call.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A device that has joined.
pub struct Device {
    /// Its certificate, key and roots.
    pub credentials: Arc<Credentials>,
    /// What the registrar answered.
    pub enrolled: EnrollResponse,
    registrar: String,
}

impl Device {
    /// Joins as `name`, with a fresh key.
    pub async fn join(join: &JoinCommand, name: &str) -> Result<Self, Error> {
        let key = rcgen::KeyPair::generate()?;
        let request = rcgen::CertificateParams::default().serialize_request(&key)?;
        Self::join_with(join, name, &key, request.der().to_vec()).await
    }

    /// Joins as `name` with this key and certificate request.
    pub async fn join_with(
        join: &JoinCommand,
        name: &str,
        key: &rcgen::KeyPair,
        request: Vec<u8>,
    ) -> Result<Self, Error> {
        let option = |name| join.option(name).ok_or_else(|| format!("no --{name} in {join:?}"));
        let registrar = option("registrar")?.to_owned();
        let hash: SpkiHash = option("ca-hash")?.parse()?;
        let channel = grpc::connect(&registrar, Arc::new(pinned_client_config(hash)?)).await?;
        let request = EnrollRequest {
            token: option("token")?.to_owned(),
            certificate_request: request,
            name: name.to_owned(),
            party: String::new(),
        };
        let enrolled = EnrollmentServiceClient::new(channel).enroll(request).await?.into_inner();
        let certificates =
            |list: &[Vec<u8>]| list.iter().map(|der| CertificateDer::from(der.clone())).collect::<Vec<_>>();
        let pair = KeyPair {
            chain: certificates(&enrolled.certificate_chain),
            key: PrivateKeyDer::try_from(key.serialize_der())?,
        };
        let credentials = Credentials::new(&pair, &certificates(&enrolled.roots))?;
        Ok(Self { credentials, enrolled, registrar })
    }

    /// Connects with the device's certificate to the registrar that it joined at.
    pub async fn connect(&self) -> Result<RegistrationServiceClient<Channel>, Error> {
        self.connect_to(&self.registrar).await
    }

    /// Connects with the device's certificate to this registrar, `HOST:PORT`.
    pub async fn connect_to(&self, registrar: &str) -> Result<RegistrationServiceClient<Channel>, Error> {
        let accept = |party: &Party| matches!(party, Party::Registrar { .. });
        let config = self.credentials.client_config(accept, ALPN_H2)?;
        Ok(RegistrationServiceClient::new(grpc::connect(registrar, Arc::new(config)).await?))
    }
}

/// A connection with the operator's credential in the file at `path`.
pub async fn operator(path: &Path) -> Result<Channel, Error> {
    let credential = OperatorCredential::load(path)?;
    let credentials = Credentials::new(&credential.key_pair()?, &credential.trusted()?)?;
    let config = credentials.client_config(|party| matches!(party, Party::Registrar { .. }), ALPN_H2)?;
    Ok(grpc::connect(&credential.registrar, Arc::new(config)).await?)
}

/// A Register request of a device whose key is `number`, at an address made from `address`.
pub fn register_request(number: u64, address: u32) -> RegisterRequest {
    let mut public_key = vec![0; 32];
    for (slot, byte) in public_key.iter_mut().zip(number.to_be_bytes().into_iter().chain([1])) {
        *slot = byte;
    }
    RegisterRequest {
        public_key,
        private_endpoints: vec![Endpoint {
            address: std::net::Ipv4Addr::from(0x0A00_0000 | (address & 0x00FF_FFFF)).to_string(),
            port: 7551,
        }],
        agent_version: "test".into(),
        ..RegisterRequest::default()
    }
}
