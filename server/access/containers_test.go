package access

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/store"
)

// noStore knows no workspace.
type noStore struct{}

func (noStore) Workspace(id string) (store.Workspace, error) {
	return store.Workspace{}, &store.NotFoundError{WorkspaceID: id}
}

// A container that holds all the connections it can get keeps no other one out, and
// gets one again when it closes one.
func TestContainers_ConnectionsPerContainer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	plain, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	place := "hostile"
	c := NewContainers(noStore{}, slog.New(slog.DiscardHandler), func(conn net.Conn) (string, error) {
		real, err := cgroupOf(conn) // this process's
		if err != nil || real == "" {
			t.Errorf("cgroup %q, %v", real, err)
		}
		return place, err
	})
	l := c.Listen(plain)
	defer l.Close()
	// accept connects and reports whether the connection is taken.
	accept := func(as string) (net.Conn, bool) {
		t.Helper()
		client, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		place = as
		conn, err := plain.Accept()
		if err != nil {
			t.Fatal(err)
		}
		taken, err := c.take(conn)
		if err != nil {
			conn.Close()
			return nil, false
		}
		return taken, true
	}
	var held []net.Conn
	for i := range 1000 {
		conn, ok := accept("hostile")
		if want := i < MaxPerContainer; ok != want {
			t.Fatalf("connection %d: taken %t", i, ok)
		}
		if ok {
			held = append(held, conn)
		}
	}
	other, ok := accept("other")
	if !ok {
		t.Fatal("another container is kept out")
	}
	for range 2 { // closing twice frees one place
		held[0].Close()
	}
	if _, ok := accept("hostile"); !ok {
		t.Error("a connection that was closed counts still")
	}
	if _, ok := accept("hostile"); ok {
		t.Error("one that was closed twice counts twice")
	}
	other.Close()
	if c.open != MaxPerContainer {
		t.Errorf("%d are open", c.open)
	}

	// Accept itself closes what is one too many, and goes on.
	refused, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer refused.Close()
	place = "hostile"
	go func() { _, _ = l.Accept() }()
	if _, err := refused.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("got %v", err)
	}
}

// A container makes so many calls and no more, by however many connections; another
// one is not hindered.
func TestContainers_CallsPerContainer(t *testing.T) {
	place := "hostile"
	c := NewContainers(noStore{}, slog.New(slog.DiscardHandler), func(net.Conn) (string, error) { return place, nil })
	call := func(conn net.Conn) error {
		_, info, err := c.Credentials().ServerHandshake(conn)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Tap(peer.NewContext(context.Background(), &peer.Peer{AuthInfo: info}), nil)
		return err
	}
	connect := func(as string) net.Conn {
		place = as
		server, _ := net.Pipe()
		conn, err := c.take(server)
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	refused := 0
	for range 4 {
		conn := connect("hostile")
		for range callBurst {
			if err := call(conn); err != nil {
				if status.Code(err) != codes.ResourceExhausted {
					t.Fatal(err)
				}
				refused++
			}
		}
		conn.Close() // a new connection is no new beginning
	}
	if refused < 2*callBurst {
		t.Errorf("only %d calls were refused", refused)
	}
	if err := call(connect("other")); err != nil {
		t.Errorf("another container: %v", err)
	}
	if _, _, err := c.Credentials().ServerHandshake(&net.TCPConn{}); err == nil {
		t.Error("a connection that Listen has not taken is let in")
	}
	// What there is to remember has an end.
	for i := range 1000 {
		connect(string(rune('A'+i%26)) + string(rune('a'+i/26))).Close()
	}
	if len(c.places) > 300 {
		t.Errorf("%d places are remembered", len(c.places))
	}
}
