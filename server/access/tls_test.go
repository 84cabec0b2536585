package access

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// authority issues certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	a.key, a.cert = a.issue(template)
	return a
}

// issue signs by the authority, or with none yet by the key itself.
func (a *authority) issue(template *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	parent, signer := template, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return key, cert
}

// pair makes a certificate; it is good for an hour unless edit says otherwise.
func (a *authority) pair(edit func(*x509.Certificate)) tls.Certificate {
	a.t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	edit(template)
	key, cert := a.issue(template)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (a *authority) pem() []byte { return certPEM(a.cert.Raw) }

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(t *testing.T, c tls.Certificate) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func dnsNames(names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.DNSNames = names }
}

func uris(t *testing.T, texts ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.DNSNames = []string{"ci.example.org"} // which must not count beside it
		for _, text := range texts {
			u, err := url.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = append(c.URIs, u)
		}
	}
}

// tlsServer is a gRPC server with TLS on a TCP port. Its one interceptor admits
// whom the health service's rule admits.
type tlsServer struct {
	t       *testing.T
	dir     string
	cfg     TLSConfig
	tls     *TLS
	authn   *Authenticator
	address string
	log     *bytes.Buffer // to be read once nothing is logged any more
}

const tlsName = "workspaced.test"

func (s *tlsServer) write(cert tls.Certificate, ca []byte) {
	s.t.Helper()
	for path, content := range map[string][]byte{
		s.cfg.CertFile: certPEM(cert.Certificate[0]), s.cfg.KeyFile: keyPEM(s.t, cert), s.cfg.ClientCAFile: ca,
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

func newTLSServer(t *testing.T, own *authority, clients *authority) *tlsServer {
	t.Helper()
	dir := t.TempDir()
	s := &tlsServer{t: t, dir: dir, authn: new(Authenticator), log: new(bytes.Buffer), cfg: TLSConfig{
		CertFile: filepath.Join(dir, "cert"), KeyFile: filepath.Join(dir, "key"), ClientCAFile: filepath.Join(dir, "ca"),
		Logger: slog.New(slog.DiscardHandler),
	}}
	s.write(own.pair(dnsNames(tlsName)), clients.pem())
	var err error
	if s.tls, err = LoadTLS(s.cfg); err != nil {
		t.Fatal(err)
	}
	bindings, err := ParseBindings([]string{
		"cert:dns=CI.example.org viewer", "cert:spiffe://example.org/ci viewer", "cert:cn=ci viewer",
	}, 0)
	if err != nil {
		t.Fatal(err)
	}
	creds := NewCredentials(CredentialsConfig{Bindings: bindings, TLS: s.tls, Logger: slog.New(slog.NewTextHandler(io.MultiWriter(s.log, t.Output()), nil))})
	policy := make(Policy)
	policy.Expose(healthv1.File_grpc_health_v1_health_proto.Services().Get(0), ExposureAuthenticated)
	admit := func(ctx context.Context, method string) error {
		_, err := policy.Admit(method, s.authn.Identify(ctx))
		var unauthenticated *UnauthenticatedError
		switch {
		case err == nil:
			return nil
		case errors.As(err, &unauthenticated):
			return status.Error(codes.Unauthenticated, err.Error())
		}
		return status.Error(codes.PermissionDenied, err.Error())
	}
	g := grpc.NewServer(grpc.Creds(creds), grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if err := admit(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return handler(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			if err := admit(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			ctx, release := s.authn.Hold(stream.Context(), s.authn.Identify(stream.Context()))
			defer release()
			<-ctx.Done() // a stream that lasts
			return status.Error(codes.Unauthenticated, context.Cause(ctx).Error())
		}))
	healthv1.RegisterHealthServer(g, health.NewServer())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return s
}

// client is a client with these certificates that trusts the authority.
func (s *tlsServer) client(trusts *authority, edit func(*tls.Config), certs ...tls.Certificate) healthv1.HealthClient {
	s.t.Helper()
	cfg := &tls.Config{ServerName: tlsName, RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	cfg.RootCAs.AddCert(trusts.cert)
	if len(certs) > 0 {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certs[0], nil }
	}
	if edit != nil {
		edit(cfg)
	}
	return s.dial(credentials.NewTLS(cfg))
}

func (s *tlsServer) dial(creds credentials.TransportCredentials) healthv1.HealthClient {
	s.t.Helper()
	conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(creds))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return healthv1.NewHealthClient(conn)
}

func check(t *testing.T, c healthv1.HealthClient) error {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := c.Check(ctx, &healthv1.HealthCheckRequest{})
	return err
}

// Who may connect with which certificate, and as whom.
func TestTLSMatrix(t *testing.T) {
	own, clients, other := newAuthority(t, "own"), newAuthority(t, "clients"), newAuthority(t, "clients")
	s := newTLSServer(t, own, clients)
	good := dnsNames("ci.example.org")
	for name, test := range map[string]struct {
		certs []tls.Certificate
		edit  func(*tls.Config)
		want  codes.Code
	}{
		"a DNS name":                    {[]tls.Certificate{clients.pair(good)}, nil, codes.OK},
		"a DNS name in capitals":        {[]tls.Certificate{clients.pair(dnsNames("Ci.Example.ORG"))}, nil, codes.OK},
		"the second DNS name":           {[]tls.Certificate{clients.pair(dnsNames("x.example.org", "ci.example.org"))}, nil, codes.OK},
		"a SPIFFE id":                   {[]tls.Certificate{clients.pair(uris(t, "spiffe://example.org/ci"))}, nil, codes.OK},
		"a common name":                 {[]tls.Certificate{clients.pair(func(c *x509.Certificate) { c.Subject.CommonName = "ci" })}, nil, codes.OK},
		"a common name and a DNS name":  {[]tls.Certificate{clients.pair(func(c *x509.Certificate) { c.Subject.CommonName, c.DNSNames = "ci", []string{"x"} })}, nil, codes.PermissionDenied},
		"wrong DNS name":                {[]tls.Certificate{clients.pair(dnsNames("cd.example.org"))}, nil, codes.PermissionDenied},
		"a wildcard":                    {[]tls.Certificate{clients.pair(dnsNames("*.example.org"))}, nil, codes.PermissionDenied},
		"wrong SPIFFE id":               {[]tls.Certificate{clients.pair(uris(t, "spiffe://example.org/cd"))}, nil, codes.PermissionDenied},
		"SPIFFE id in another domain":   {[]tls.Certificate{clients.pair(uris(t, "spiffe://example.com/ci"))}, nil, codes.PermissionDenied},
		"two SPIFFE ids":                {[]tls.Certificate{clients.pair(uris(t, "spiffe://example.org/ci", "spiffe://example.org/cd"))}, nil, codes.Unavailable},
		"a SPIFFE id with a query":      {[]tls.Certificate{clients.pair(uris(t, "spiffe://example.org/ci?a"))}, nil, codes.Unavailable},
		"no name":                       {[]tls.Certificate{clients.pair(func(*x509.Certificate) {})}, nil, codes.Unavailable},
		"no certificate":                {nil, nil, codes.Unavailable},
		"another authority of the name": {[]tls.Certificate{other.pair(good)}, nil, codes.Unavailable},
		"the server's authority":        {[]tls.Certificate{own.pair(good)}, nil, codes.Unavailable},
		"self-signed":                   {[]tls.Certificate{(&authority{t: t}).pair(good)}, nil, codes.Unavailable},
		"expired": {[]tls.Certificate{clients.pair(func(c *x509.Certificate) {
			good(c)
			c.NotAfter = time.Now().Add(-time.Minute)
		})}, nil, codes.Unavailable},
		"not yet valid": {[]tls.Certificate{clients.pair(func(c *x509.Certificate) {
			good(c)
			c.NotBefore = time.Now().Add(time.Minute)
		})}, nil, codes.Unavailable},
		"a server's certificate": {[]tls.Certificate{clients.pair(func(c *x509.Certificate) {
			good(c)
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		})}, nil, codes.Unavailable},
		"TLS 1.2":           {[]tls.Certificate{clients.pair(good)}, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, codes.Unavailable},
		"wrong server name": {[]tls.Certificate{clients.pair(good)}, func(c *tls.Config) { c.ServerName = "other.test" }, codes.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			if err := check(t, s.client(own, test.edit, test.certs...)); status.Code(err) != test.want {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
	t.Run("plain text", func(t *testing.T) {
		if err := check(t, s.dial(insecure.NewCredentials())); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
	})
	t.Run("who is refused stands in the log", func(t *testing.T) {
		if !strings.Contains(s.log.String(), "connection refused") {
			t.Error("it does not")
		}
	})
}

// Files that change count for new connections, and for the clients of those that
// are there; files that are broken change nothing.
func TestTLSReload(t *testing.T) {
	own, clients, newClients := newAuthority(t, "own"), newAuthority(t, "clients"), newAuthority(t, "new clients")
	s := newTLSServer(t, own, clients)
	good := dnsNames("ci.example.org")
	old := clients.pair(good)
	live := s.client(own, nil, old)
	if err := check(t, live); err != nil {
		t.Fatal(err)
	}
	watch, err := live.Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	reload := func(wantChanged bool, want string) {
		t.Helper()
		changed, err := s.tls.Reload()
		s.authn.Recheck()
		switch {
		case changed != wantChanged:
			t.Errorf("changed: %v", changed)
		case want == "" && err != nil, want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("got %v, want %q", err, want)
		}
	}
	reload(false, "")

	// Broken files, one after the other, as they are in the middle of being replaced.
	next := own.pair(dnsNames(tlsName))
	for _, broken := range []struct {
		path    string
		content []byte
		want    string
	}{
		{s.cfg.CertFile, certPEM(next.Certificate[0]), "are no certificate and its key"}, // the key does not fit yet
		{s.cfg.CertFile, []byte("x"), "are no certificate and its key"},
		{s.cfg.CertFile, nil, "are no certificate and its key"},
		{s.cfg.ClientCAFile, []byte("x"), "has no certificate in PEM"},
	} {
		before, err := os.ReadFile(broken.path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(broken.path, broken.content, 0o600); err != nil {
			t.Fatal(err)
		}
		reload(false, broken.want)
		if err := check(t, s.client(own, nil, old)); err != nil {
			t.Errorf("a new connection meanwhile: %v", err)
		}
		if err := os.WriteFile(broken.path, before, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(s.cfg.KeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	reload(false, "can be read by everybody")
	if err := os.Remove(s.cfg.KeyFile); err != nil {
		t.Fatal(err)
	}
	reload(false, "no such file")
	reload(false, "no such file")

	// Another certificate of the server, under another authority.
	newOwn := newAuthority(t, "new own")
	s.write(newOwn.pair(dnsNames(tlsName)), append(clients.pem(), newClients.pem()...))
	reload(true, "")
	if err := check(t, live); err != nil {
		t.Errorf("on the live connection: %v", err)
	}
	if err := check(t, s.client(newOwn, nil, newClients.pair(good))); err != nil {
		t.Errorf("on a new one: %v", err)
	}
	if err := check(t, s.client(own, nil, old)); status.Code(err) != codes.Unavailable {
		t.Errorf("who trusts the old authority: %v", err)
	}

	// The clients' old authority is taken out.
	s.write(newOwn.pair(dnsNames(tlsName)), newClients.pem())
	reload(true, "")
	if err := check(t, live); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a call on the live connection: %v", err)
	}
	if _, err := watch.Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("the stream on it: %v", err)
	}
	if err := check(t, s.client(newOwn, nil, old)); status.Code(err) != codes.Unavailable {
		t.Errorf("a new connection: %v", err)
	}
}

// A connection does not outlive its certificate, nor does a stream on it.
func TestTLSExpiryOfALiveConnection(t *testing.T) {
	own, clients := newAuthority(t, "own"), newAuthority(t, "clients")
	s := newTLSServer(t, own, clients)
	client := s.client(own, nil, clients.pair(func(c *x509.Certificate) {
		c.DNSNames = []string{"ci.example.org"}
		c.NotAfter = time.Now().Add(2500 * time.Millisecond).Truncate(time.Second)
	}))
	watch, err := client.Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if err := check(t, client); err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("the stream: %v", err)
	}
	if err := check(t, client); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a call: %v", err)
	}
}

func TestLoadTLSRefuses(t *testing.T) {
	if _, err := LoadTLS(TLSConfig{CertFile: "/no/cert", KeyFile: "/no/key", ClientCAFile: "/no/ca"}); err == nil || !strings.Contains(err.Error(), "/no/cert") {
		t.Errorf("got %v", err)
	}
}

// A certificate lets in no longer than any certificate of its chain is good.
func TestClientCert_EndsWithItsChain(t *testing.T) {
	root := newAuthority(t, "root")
	between := &authority{t: t}
	between.key, between.cert = root.issue(&x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "between"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * time.Minute),
	})
	leaf, err := x509.ParseCertificate(between.pair(func(*x509.Certificate) {}).Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	server := &TLS{cfg: TLSConfig{Now: func() time.Time { return now }}}
	pool := x509.NewCertPool()
	pool.AddCert(root.cert)
	by := &trust{pool: pool}
	server.current.Store(by)
	end := endOf([][]*x509.Certificate{{leaf, between.cert, root.cert}})
	if !end.Equal(between.cert.NotAfter) {
		t.Errorf("it ends at %v, want %v", end, between.cert.NotAfter)
	}
	c := &clientCert{tls: server, chain: []*x509.Certificate{leaf, between.cert}}
	c.verified.Store(&verified{by, end})
	for _, step := range []struct {
		after time.Duration
		good  bool
	}{{0, true}, {9 * time.Minute, true}, {2 * time.Minute, false}} {
		now = now.Add(step.after)
		if err := c.valid(); (err == nil) != step.good {
			t.Errorf("after %v more: %v", step.after, err)
		}
	}
}
