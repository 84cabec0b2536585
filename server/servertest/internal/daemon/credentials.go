package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"

	"google.golang.org/grpc/credentials"

	"github.com/workspaced/workspaced/server/access"
)

// DefaultSubject is whose calls come by a connection that does not say whose: one
// that may do everything.
const DefaultSubject = "test"

// As are credentials of a client's connections, whose calls are the subject's.
func As(s access.Subject) credentials.TransportCredentials { return clientCredentials{subject: s} }

// Who a client is it says in the first line of its connection: HTTP/2 begins with
// a P, this with a brace.
type clientCredentials struct {
	serverCredentials
	subject access.Subject
}

func (c clientCredentials) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if err := json.NewEncoder(conn).Encode(c.subject); err != nil {
		return nil, nil, fmt.Errorf("tell who calls: %w", err)
	}
	return conn, access.NewAuthInfo(c.subject), nil
}

func (c clientCredentials) Clone() credentials.TransportCredentials { return c }

// serverCredentials believe what the client says.
type serverCredentials struct {
	credentials.TransportCredentials
}

func (serverCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	r := bufio.NewReader(conn)
	first, err := r.Peek(1)
	if err != nil {
		return nil, nil, fmt.Errorf("hear who calls: %w", err)
	}
	subject := access.Everything(DefaultSubject)
	if first[0] == '{' {
		line, err := r.ReadBytes('\n')
		if err == nil {
			subject = access.Subject{}
			err = json.Unmarshal(line, &subject)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("hear who calls: %w", err)
		}
	}
	return readConn{conn, r}, access.NewAuthInfo(subject), nil
}

func (serverCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "servertest"}
}

func (c serverCredentials) Clone() credentials.TransportCredentials { return c }

// readConn is a connection of which something was read already.
type readConn struct {
	net.Conn
	r *bufio.Reader
}

func (c readConn) Read(b []byte) (int, error) { return c.r.Read(b) }
