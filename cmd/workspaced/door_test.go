package main

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
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// writeCerts writes an authority, ca.pem, and certificates of it with their keys:
// server.pem for 127.0.0.1 and ops.pem for ops.test.
func writeCerts(t *testing.T, dir string) {
	t.Helper()
	now := time.Now()
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: name},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
	}
	write := func(name, kind string, der []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sign := func(name string, template, parent *x509.Certificate, by *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if by == nil {
			by = key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, by)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		write(name+".pem", "CERTIFICATE", der)
		write(name+".key", "PRIVATE KEY", keyDER)
		return cert, key
	}
	authority := template("authority")
	authority.IsCA, authority.BasicConstraintsValid, authority.KeyUsage, authority.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
	ca, caKey := sign("ca", authority, authority, nil)
	server := template("server")
	server.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	sign("server", server, ca, caKey)
	ops := template("")
	ops.DNSNames = []string{"ops.test"}
	sign("ops", ops, ca, caKey)
}

// freeAddress is a loopback address that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// The daemon's doors: the unix socket, TLS with a client's certificate, and a token
// by either, which lasts over a restart and is on no disk.
func TestServeAccess(t *testing.T) {
	in := newInstance(t)
	writeCerts(t, in.base)
	address := freeAddress(t)
	flags := []string{
		"--listen=" + address, "--tls-cert-file=" + in.path("server.pem"), "--tls-key-file=" + in.path("server.key"),
		"--tls-client-ca-file=" + in.path("ca.pem"), "--bindings=cert:dns=ops.test operator name=ops-*",
	}
	cert, err := tls.LoadX509KeyPair(in.path("ops.pem"), in.path("ops.key"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(in.path("ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	overTLS := func() *grpc.ClientConn {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
			RootCAs: roots, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13,
		})))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	whoIs := func(ctx context.Context, conn *grpc.ClientConn) string {
		t.Helper()
		info, err := workspacev1.NewAdminControlClient(conn).GetServerInfo(ctx, &workspacev1.GetServerInfoRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return status.Code(err).String()
		}
		return info.GetCaller().GetSubject()
	}
	bearer := func(token string) context.Context {
		return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}

	s := in.serve(flags...)
	made, err := workspacev1.NewAdminControlClient(s.conn).CreateToken(ctx, &workspacev1.CreateTokenRequest{
		Token: &workspacev1.Token{Subject: "ci", Roles: []workspacev1.Role{workspacev1.Role_ROLE_VIEWER}},
	})
	if err != nil {
		t.Fatal(err)
	}
	token := made.GetSecret()
	for round := range 2 {
		secure := overTLS()
		for name, got := range map[string][2]string{
			"the unix socket":               {whoIs(ctx, s.conn), "unix:uid=0"},
			"a certificate":                 {whoIs(ctx, secure), "cert:dns=ops.test"},
			"a token by the socket":         {whoIs(bearer(token), s.conn), "token:ci"},
			"a token beside a certificate":  {whoIs(bearer(token), secure), "token:ci"},
			"no token by the socket":        {whoIs(bearer(token[:46]+"_"), s.conn), codes.Unauthenticated.String()},
			"no token beside a certificate": {whoIs(bearer("x"), secure), codes.Unauthenticated.String()},
			"plain text where TLS is spoken": {whoIs(func() context.Context {
				ctx, cancel := context.WithTimeout(ctx, time.Second)
				t.Cleanup(cancel)
				return ctx
			}(), in.dial(address)), codes.DeadlineExceeded.String()},
		} {
			if got[0] != got[1] {
				t.Errorf("round %d, %s: it is %s, want %s", round, name, got[0], got[1])
			}
		}
		_, err := workspacev1.NewWorkspaceControlClient(secure).StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{Name: "workspaces/other"})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("round %d: outside its scope: %v", round, err)
		}
		if round == 0 {
			if err := s.stop(); err != nil {
				t.Error(err)
			}
			wantNowhere(t, in.base, token)
			s = in.serve(flags...)
			list, err := workspacev1.NewAdminControlClient(s.conn).ListTokens(ctx, &workspacev1.ListTokensRequest{})
			if err != nil || len(list.GetTokens()) != 1 || list.GetTokens()[0].GetLastUseTime() == nil {
				t.Errorf("after a restart: %v, %v", list, err)
			}
		}
	}
	if bytes.Contains([]byte(s.log.String()), []byte(token[12:])) {
		t.Error("the log has the token")
	}
}

// wantNowhere checks that no file below dir has the token, or more of it than is
// listed.
func wantNowhere(t *testing.T, dir, token string) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		files++
		if bytes.Contains(b, []byte(token[12:])) {
			t.Errorf("%s has the token", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 5 {
		t.Errorf("only %d files", files)
	}
}
