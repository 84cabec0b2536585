package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/store"
)

// Bounds of what containers may ask for: each of them may be hostile. What one may
// have is enough for a program that keeps a connection or two and a wait on each.
const (
	// MaxContainers is how many connections there are, of all containers.
	MaxContainers = 8192
	// MaxPerContainer is how many of them one container has.
	MaxPerContainer = 8
	// callsPerContainer is how many calls a second a container makes, and
	// callBurst how many at once.
	callsPerContainer rate.Limit = 20
	callBurst         int        = 100
)

// Containers let the containers of workspaces in, by a socket that no one else is
// meant to use. On it the peer's credentials mean nothing, for a container's root
// is uid 0 there as well, and neither does any token but a container's.
type Containers struct {
	store containerStore
	log   *slog.Logger
	// placeOf tells one container's connections from another's.
	placeOf  func(net.Conn) (string, error)
	refusals *refusals

	mu     sync.Mutex
	open   int
	places map[string]*place
	prune  int // as many places as there may be before those that are done with go
}

// containerStore is what Containers need of *store.Store.
type containerStore interface {
	Workspace(id string) (store.Workspace, error)
}

// place is where connections come from: a container.
type place struct {
	open  int // guarded by Containers.mu
	calls *rate.Limiter
}

// NewContainers lets containers in whose tokens the store knows. PlaceOf names
// where a connection comes from; nil: by the cgroup of its process, which no
// container can change.
func NewContainers(st containerStore, log *slog.Logger, placeOf func(net.Conn) (string, error)) *Containers {
	if placeOf == nil {
		placeOf = cgroupOf
	}
	return &Containers{
		store: st, log: log, placeOf: placeOf, refusals: &refusals{limit: rate.NewLimiter(1, 10)},
		places: make(map[string]*place), prune: 256,
	}
}

// cgroupOf is the cgroup of the process that has made a connection, as the kernel
// tells it. One that has ended since is not let in: nobody can say whose it was.
func cgroupOf(conn net.Conn) (string, error) {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return "", fmt.Errorf("a %T comes from no container", conn)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return "", err
	}
	var cred *unix.Ucred
	failed := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(failed, err); err != nil {
		return "", err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cred.Pid))
	return string(b), err
}

// Listen bounds the connections that l takes: one too many is closed at once, and
// keeps nobody else from being taken.
func (c *Containers) Listen(l net.Listener) net.Listener { return &containerListener{l, c} }

type containerListener struct {
	net.Listener
	containers *Containers
}

// Accept implements net.Listener.
func (l *containerListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		taken, err := l.containers.take(conn)
		if err == nil {
			return taken, nil
		}
		conn.Close()
		l.containers.refusals.tell(l.containers.log, conn, err)
	}
}

var (
	errTooMany = errors.New("all containers together have too many connections")
	errItsMax  = errors.New("the container has too many connections")
)

func (c *Containers) take(conn net.Conn) (net.Conn, error) {
	name, err := c.placeOf(conn)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.places[name]
	switch {
	case c.open >= MaxContainers:
		return nil, errTooMany
	case p == nil:
		c.forget()
		p = &place{calls: rate.NewLimiter(callsPerContainer, callBurst)}
		c.places[strings.Clone(name)] = p
	case p.open >= MaxPerContainer:
		return nil, errItsMax
	}
	p.open++
	c.open++
	return &containerConn{Conn: conn, place: p, release: sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		p.open--
		c.open--
	})}, nil
}

// forget drops places that have no connection and may call as much as a new one,
// now and then. The lock is held.
func (c *Containers) forget() {
	if len(c.places) < c.prune {
		return
	}
	for name, p := range c.places {
		if p.open == 0 && int(p.calls.Tokens()) >= callBurst {
			delete(c.places, name)
		}
	}
	c.prune = max(256, 2*len(c.places))
}

// containerConn is a connection of a container.
type containerConn struct {
	net.Conn
	place   *place
	release func()
}

// Close implements net.Conn.
func (c *containerConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// Credentials are those of the connections that Listen takes.
func (c *Containers) Credentials() credentials.TransportCredentials {
	return containerCredentials{&Credentials{}, c}
}

type containerCredentials struct {
	*Credentials
	containers *Containers
}

// ServerHandshake implements credentials.TransportCredentials.
func (c containerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	from, ok := conn.(*containerConn)
	if !ok {
		return nil, nil, fmt.Errorf("access: a %T was not taken by Containers.Listen", conn)
	}
	info := authInfo(Subject{}, credentials.PrivacyAndIntegrity)
	info.container = &container{c.containers, from.place}
	return conn, info, nil
}

// Clone implements credentials.TransportCredentials.
func (c containerCredentials) Clone() credentials.TransportCredentials { return c }

// container is the other end of a connection.
type container struct {
	containers *Containers
	place      *place
}

func containerOf(ctx context.Context) *container {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(AuthInfo); ok {
			return info.container
		}
	}
	return nil
}

// Tap refuses calls of a container that makes too many, before anything else is
// done about them: no log and no audit log gets longer by them. It is the gRPC
// server's InTapHandle.
func (c *Containers) Tap(ctx context.Context, _ *tap.Info) (context.Context, error) {
	if from := containerOf(ctx); from == nil || !from.place.calls.Allow() {
		return nil, status.Errorf(codes.ResourceExhausted, "more than %v calls a second, or %d at once", callsPerContainer, callBurst)
	}
	return ctx, nil
}

// identify is whose container has the token. That of no container, of one that has
// ended, or none at all, makes the caller nobody.
func (c *Containers) identify(ctx context.Context, token string) *Identity {
	nobody := func(why string) *Identity {
		return &Identity{Err: &UnauthenticatedError{Token: token != "", Why: why}}
	}
	id := store.InstanceTokenOwner(token)
	if id == "" {
		return nobody("no container's token on the containers' socket")
	}
	w, err := c.store.Workspace(id)
	instance := ""
	switch {
	case err == nil:
		instance = w.TokenInstance(token)
	case !errors.Is(err, store.ErrNotFound):
		c.log.ErrorContext(ctx, "a container's token can't be looked up", "workspace", id, "error", err)
	}
	if instance == "" {
		return nobody("unknown token of a container")
	}
	return &Identity{Subject: Subject{
		Name:     "workspace:" + id,
		Grants:   []Grant{{Roles: RolesOf(workspacev1.Role_ROLE_WORKSPACE), Scope: Scope{Workspaces: id}}},
		Instance: &Instance{WorkspaceUID: strings.Clone(w.UID), ID: strings.Clone(instance)},
	}}
}

// Instance is the container that a call was made by.
type Instance struct {
	WorkspaceUID string
	ID           string
}

// Check returns nil if the instance's token is valid still, or an
// *UnauthenticatedError. W is its workspace, or one of the same id.
func (in *Instance) Check(w *store.Workspace) error {
	if w.UID == in.WorkspaceUID && w.HasToken(in.ID) {
		return nil
	}
	return &UnauthenticatedError{Token: true, Why: "the container's token has ended"}
}
