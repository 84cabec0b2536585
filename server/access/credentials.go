package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// AuthInfo is what a connection's credentials say; it implements
// credentials.AuthInfo. Its identity is made once, for all calls.
type AuthInfo struct {
	credentials.CommonAuthInfo
	identity *Identity
	// container is the other end, if that is one; then only its token counts.
	container *container
}

// AuthType implements credentials.AuthInfo.
func (AuthInfo) AuthType() string { return "workspaced" }

// connection is the identity of the connection that ctx's call came by.
func connection(ctx context.Context) *Identity {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return &Identity{}
	}
	info, ok := p.AuthInfo.(AuthInfo)
	if !ok {
		return &Identity{}
	}
	if err := info.identity.check(); err != nil {
		return &Identity{Err: err}
	}
	return info.identity
}

// Credentials tell who is at the other end of a connection, by the kind of the
// connection. They are a server's only.
type Credentials struct {
	bindings Bindings
	tls      *TLS
	insecure bool
	log      *slog.Logger
	refusals *refusals
}

// CredentialsConfig is what Credentials are made from.
type CredentialsConfig struct {
	Bindings Bindings
	// TLS is for connections by TCP; nil: there are none but insecure ones.
	TLS *TLS
	// Insecure: TCP in plain text is taken, as the identity `insecure`.
	Insecure bool
	// Logger is told of connections that were refused.
	Logger *slog.Logger
}

// NewCredentials makes credentials for all listeners of a server.
func NewCredentials(cfg CredentialsConfig) *Credentials {
	return &Credentials{
		bindings: cfg.Bindings, tls: cfg.TLS, insecure: cfg.Insecure,
		log: cfg.Logger, refusals: &refusals{limit: rate.NewLimiter(1, 10)},
	}
}

// ServerHandshake implements credentials.TransportCredentials.
func (c *Credentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := c.handshake(conn)
	if err != nil {
		c.refusals.tell(c.log, conn, err)
		return nil, nil, err
	}
	return secured, info, nil
}

var errPlain = errors.New("plain text is not served here")

func (c *Credentials) handshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	kind := conn
	if inner, ok := conn.(interface{ NetConn() net.Conn }); ok { // it is counted
		kind = inner.NetConn()
	}
	switch kind := kind.(type) {
	case *net.UnixConn:
		subject, err := c.unixSubject(kind)
		return conn, authInfo(subject, credentials.PrivacyAndIntegrity), err
	case *net.TCPConn:
		if c.tls != nil {
			return c.tls.handshake(conn, c.bindings)
		}
		if c.insecure {
			subject := Subject{Name: IdentityInsecure, Grants: c.bindings.Grants(IdentityInsecure)}
			return conn, authInfo(subject, credentials.NoSecurity), nil
		}
		return nil, nil, errPlain
	}
	return nil, nil, fmt.Errorf("nobody is known on a %T", kind)
}

func authInfo(s Subject, level credentials.SecurityLevel) AuthInfo {
	return AuthInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: level}, identity: &Identity{Subject: s}}
}

func (c *Credentials) unixSubject(conn *net.UnixConn) (Subject, error) {
	peer, err := peerOf(conn)
	if err != nil {
		return Subject{}, fmt.Errorf("the peer's credentials can't be read: %w", err)
	}
	identities := []string{uidIdentity(peer.uid)}
	for _, gid := range peer.gids {
		identities = append(identities, gidIdentity(gid))
	}
	return Subject{Name: identities[0], Grants: c.bindings.Grants(identities...)}, nil
}

// refusals bound how much is logged: whoever can connect could fill the disk.
type refusals struct {
	limit *rate.Limiter
	mu    sync.Mutex
	muted int
}

func (r *refusals) tell(log *slog.Logger, conn net.Conn, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.limit.Allow() {
		r.muted++
		return
	}
	log.Warn("connection refused", "peer_address", conn.RemoteAddr().String(), "error", err, "not_logged", r.muted)
	r.muted = 0
}

// ClientHandshake implements credentials.TransportCredentials.
func (*Credentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("access: these are a server's credentials")
}

// Info implements credentials.TransportCredentials.
func (*Credentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "workspaced"}
}

// Clone implements credentials.TransportCredentials.
func (c *Credentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (*Credentials) OverrideServerName(string) error { return nil }

// Fixed are credentials of a server whose callers are all the same subject, on
// any kind of connection. They are for tests and benchmarks.
func Fixed(s Subject) credentials.TransportCredentials { return fixed{&Credentials{}, s.clone()} }

type fixed struct {
	*Credentials
	subject Subject
}

func (f fixed) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return conn, NewAuthInfo(f.subject), nil
}

func (f fixed) Clone() credentials.TransportCredentials { return f }

// NewAuthInfo is that of a connection whose calls are the subject's.
func NewAuthInfo(s Subject) AuthInfo { return authInfo(s.clone(), credentials.PrivacyAndIntegrity) }
