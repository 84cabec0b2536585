package access

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// dialVariable makes the test's own program a client that connects to a socket as
// one user after the other, and waits for the end of each connection.
const dialVariable = "ACCESS_TEST_DIAL"

type dial struct {
	Socket string
	As     []peerID
}

type peerID struct {
	UID, GID int
	Groups   []int
}

func (d *dial) run() error {
	for _, as := range d.As {
		if err := d.runAs(as); err != nil {
			return fmt.Errorf("as %+v: %w", as, err)
		}
	}
	return nil
}

// runAs connects with the effective ids, which are those that count, and becomes
// root again.
func (d *dial) runAs(as peerID) error {
	err := errors.Join(syscall.Setgroups(as.Groups), syscall.Setresgid(-1, as.GID, -1), syscall.Setresuid(-1, as.UID, -1))
	if err != nil {
		return err
	}
	conn, err := net.Dial("unix", d.Socket)
	if err == nil {
		_, err = io.ReadAll(conn)
	}
	return errors.Join(err, syscall.Setresuid(-1, 0, -1), syscall.Setresgid(-1, 0, -1))
}

func TestMain(m *testing.M) {
	if line := os.Getenv(dialVariable); line != "" {
		var d dial
		if err := errors.Join(json.Unmarshal([]byte(line), &d), d.run()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Who connects to the unix socket is who the kernel says, with all its groups, and
// has what is bound to any of them.
func TestPeerCredentials(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, NOT TESTED: only root can start processes of other users")
	}
	// One without a file: every user can reach it.
	socket := fmt.Sprintf("@access-test-%d", os.Getpid())
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bindings, err := ParseBindings([]string{
		"unix:uid=4001 operator name=a-*",
		"unix:gid=4002 viewer",
		"unix:gid=4003 secret-writer label=team=a",
		"unix:socket-group admin",
	}, 4004)
	if err != nil {
		t.Fatal(err)
	}
	creds := NewCredentials(CredentialsConfig{Bindings: bindings, Logger: slog.New(slog.DiscardHandler)})
	many := []int{4003}
	for i := range 500 { // more than fit the first question
		many = append(many, 5000+i)
	}
	tests := []struct {
		name    string
		as      peerID
		subject string
		grants  []string
	}{
		{"root", peerID{0, 0, nil}, "unix:uid=0", []string{"[admin] everywhere"}},
		{"a user", peerID{4001, 1, nil}, "unix:uid=4001", []string{"[operator] a-* map[]"}},
		{"its own group", peerID{9, 4002, nil}, "unix:uid=9", []string{"[viewer] everywhere"}},
		{"supplementary groups", peerID{9, 9, []int{7, 4002, 4003}}, "unix:uid=9", []string{"[viewer] everywhere", "[secret-writer]  map[team:a]"}},
		{"many groups", peerID{9, 9, many}, "unix:uid=9", []string{"[secret-writer]  map[team:a]"}},
		{"the socket's group", peerID{9, 9, []int{4004}}, "unix:uid=9", []string{"[admin] everywhere"}},
		{"a user whose number is a group's", peerID{4002, 9, nil}, "unix:uid=4002", nil},
		{"nobody we know", peerID{65534, 65534, nil}, "unix:uid=65534", nil},
	}
	client := dial{Socket: socket}
	for _, test := range tests {
		client.As = append(client.As, test.as)
	}
	line, err := json.Marshal(client)
	if err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), self)
	child.Env = []string{dialVariable + "=" + string(line)}
	child.Stderr = t.Output()
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if err := l.(*net.UnixListener).SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			conn, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_, info, err := creds.ServerHandshake(conn)
			if err != nil {
				t.Fatal(err)
			}
			got := info.(AuthInfo).identity.Subject
			if got.Name != test.subject {
				t.Errorf("it is %s, want %s", got.Name, test.subject)
			}
			if diff := cmp.Diff(test.grants, showGrants(got.Grants)); diff != "" {
				t.Error(diff)
			}
		})
	}
	l.Close() // nobody waits for more
	if err := child.Wait(); err != nil {
		t.Error(err)
	}
}

func showGrants(grants []Grant) (show []string) {
	for _, g := range grants {
		where := "everywhere"
		if !g.Scope.All() {
			where = fmt.Sprint(g.Scope.Workspaces, " ", g.Scope.Labels)
		}
		show = append(show, fmt.Sprint(RoleNames(g.Roles.List()), " ", where))
	}
	return show
}

// On any other kind of connection nobody is known, and TCP in plain text is taken
// only where that is meant.
func TestOtherConnections(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	creds := NewCredentials(CredentialsConfig{Logger: slog.New(slog.DiscardHandler)})
	if _, _, err := creds.ServerHandshake(here); err == nil {
		t.Error("a pipe was taken")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, _, err := creds.ServerHandshake(conn); err == nil {
		t.Error("plain text was taken")
	}
	bindings, err := ParseBindings([]string{"insecure viewer"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	creds = NewCredentials(CredentialsConfig{Bindings: bindings, Insecure: true, Logger: slog.New(slog.DiscardHandler)})
	_, info, err := creds.ServerHandshake(conn)
	if err != nil {
		t.Fatal(err)
	}
	if s := info.(AuthInfo).identity.Subject; s.Name != "insecure" || len(s.Grants) != 1 || s.Grants[0].Roles != RolesOf(workspacev1.Role_ROLE_VIEWER) {
		t.Errorf("it is %+v", s)
	}
}
