package access

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
)

// TLSConfig names the files of mutual TLS, in PEM.
type TLSConfig struct {
	// CertFile is the server's certificate and those between it and its authority,
	// KeyFile its key, which nobody else may read.
	CertFile, KeyFile string
	// ClientCAFile has the authorities that clients' certificates have to come from.
	ClientCAFile string
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Logger is told of what was loaded.
	Logger *slog.Logger
}

// TLS are credentials for connections by TCP: TLS 1.3, and a certificate of the
// client's, from one of the authorities. Reload reads the files again: what they
// hold then counts for new connections, and for the clients of those that are
// there.
type TLS struct {
	cfg     TLSConfig
	current atomic.Pointer[trust]
}

// trust is what the files held.
type trust struct {
	sum   [sha256.Size]byte // of the files
	creds credentials.TransportCredentials
	pool  *x509.CertPool
}

// LoadTLS reads the files. Its errors say in one sentence what is wrong, and with
// which.
func LoadTLS(cfg TLSConfig) (*TLS, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	t := &TLS{cfg: cfg}
	if _, err := t.Reload(); err != nil {
		return nil, err
	}
	return t, nil
}

// Reload reads the files again and reports whether they have changed. With an
// error what was loaded before stays in force.
func (t *TLS) Reload() (changed bool, err error) {
	cert, err := os.ReadFile(t.cfg.CertFile)
	if err != nil {
		return false, err
	}
	key, err := readKey(t.cfg.KeyFile)
	if err != nil {
		return false, err
	}
	ca, err := os.ReadFile(t.cfg.ClientCAFile)
	if err != nil {
		return false, err
	}
	next := &trust{sum: sha256.Sum256(bytes.Join([][]byte{cert, key, ca}, []byte{0}))}
	if old := t.current.Load(); old != nil && old.sum == next.sum {
		return false, nil
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return false, fmt.Errorf("%s and %s are no certificate and its key: %w", t.cfg.CertFile, t.cfg.KeyFile, err)
	}
	next.pool = x509.NewCertPool()
	if !next.pool.AppendCertsFromPEM(ca) {
		return false, fmt.Errorf("%s has no certificate in PEM", t.cfg.ClientCAFile)
	}
	next.creds = credentials.NewTLS(&tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    next.pool,
		Time:         t.cfg.Now,
		// Each connection shows its certificate; connections live long.
		SessionTicketsDisabled: true,
	})
	t.current.Store(next)
	t.tell(pair.Leaf)
	return true, nil
}

// readKey refuses a key that everybody can read.
func readKey(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); mode&0o007 != 0 {
		return nil, fmt.Errorf("%s can be read by everybody (mode %04o): chmod o= it", path, mode)
	}
	return os.ReadFile(path)
}

// tell logs what is in force. A certificate that is not valid is loaded all the
// same: workspaces and the unix socket need none.
func (t *TLS) tell(leaf *x509.Certificate) {
	log, now := t.cfg.Logger, t.cfg.Now()
	if log == nil {
		return
	}
	attrs := []any{"file", t.cfg.CertFile, "not_before", leaf.NotBefore, "not_after", leaf.NotAfter, "names", leaf.DNSNames}
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		log.Error("the TLS certificate is not valid now: no client will connect", attrs...)
		return
	}
	log.Info("TLS certificates loaded", attrs...)
}

// handshake makes the client's certificate a subject.
func (t *TLS) handshake(conn net.Conn, bindings Bindings) (net.Conn, credentials.AuthInfo, error) {
	trusted := t.current.Load()
	secured, info, err := trusted.creds.ServerHandshake(conn)
	if err != nil {
		return nil, nil, err
	}
	secure, ok := info.(credentials.TLSInfo)
	if !ok || len(secure.State.PeerCertificates) == 0 { // TLS has refused that
		return nil, nil, errors.Join(errors.New("no client certificate"), secured.Close())
	}
	chain := secure.State.PeerCertificates
	identities, err := identitiesOf(chain[0])
	if err != nil {
		return nil, nil, errors.Join(err, secured.Close())
	}
	end := endOf(secure.State.VerifiedChains)
	id := &Identity{Subject: Subject{Name: identities[0], Grants: bindings.Grants(identities...), Expires: end}}
	c := &clientCert{tls: t, chain: chain}
	c.verified.Store(&verified{trusted, end})
	id.valid = c.valid
	return secured, AuthInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, identity: id}, nil
}

// clientCert is a client's certificate, for as long as its connection lives.
type clientCert struct {
	tls      *TLS
	chain    []*x509.Certificate
	verified atomic.Pointer[verified]
}

// verified is by what a certificate was verified, and until when that holds.
type verified struct {
	by  *trust
	end time.Time
}

// endOf is when the last of the chains ends, each with the first of its certificates.
func endOf(chains [][]*x509.Certificate) (end time.Time) {
	for _, chain := range chains {
		first := slices.MinFunc(chain, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) }).NotAfter
		if first.After(end) {
			end = first
		}
	}
	return end
}

// valid returns why the certificate is no longer one that lets in.
func (c *clientCert) valid() error {
	now := c.tls.cfg.Now()
	if now.After(c.chain[0].NotAfter) {
		return errors.New("the certificate has expired")
	}
	trusted := c.tls.current.Load()
	if v := c.verified.Load(); v.by == trusted && !now.After(v.end) {
		return nil
	}
	between := x509.NewCertPool()
	for _, cert := range c.chain[1:] {
		between.AddCert(cert)
	}
	chains, err := c.chain[0].Verify(x509.VerifyOptions{
		Roots: trusted.pool, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return fmt.Errorf("the certificate is no longer trusted: %w", err)
	}
	c.verified.Store(&verified{trusted, endOf(chains)})
	return nil
}

// identitiesOf are those that a certificate gives: its SPIFFE id alone if it has
// one, else its DNS names, else its common name. One kind only, so that a name
// which one authority gives with care can't be had by way of another field.
func identitiesOf(c *x509.Certificate) (identities []string, err error) {
	for _, uri := range c.URIs {
		if uri.Scheme != "spiffe" {
			continue
		}
		if len(c.URIs) != 1 || uri.Host == "" || uri.User != nil || uri.RawQuery != "" || uri.Fragment != "" {
			return nil, fmt.Errorf("the certificate's SPIFFE id %s is none, or not its only URI", uri)
		}
		return []string{"cert:" + uri.String()}, nil
	}
	for _, name := range c.DNSNames {
		identities = append(identities, dnsIdentity(name))
	}
	if len(identities) == 0 && c.Subject.CommonName != "" {
		identities = append(identities, "cert:cn="+c.Subject.CommonName)
	}
	if len(identities) == 0 {
		return nil, errors.New("the certificate has neither a SPIFFE id, nor a DNS name, nor a common name")
	}
	return identities, nil
}

func dnsIdentity(name string) string { return "cert:dns=" + strings.ToLower(name) }
