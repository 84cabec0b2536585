// Package servertest runs the whole of workspaced inside a test: the real
// server, store and actors over a runtime in memory, with a connected client.
// Nothing but the containers is faked, and nothing outside the process is
// needed.
//
//	func TestRotateKey(t *testing.T) {
//		s := servertest.New(t)
//		// s.Client is a workspacev1.WorkspaceControlClient.
//	}
//
// It works inside a testing/synctest bubble.
package servertest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/servertest/internal/daemon"
)

// waitLimit bounds WaitGeneration.
const waitLimit = 30 * time.Second

// Server is a running workspaced and a client that is connected to it.
type Server struct {
	// Client calls the server.
	Client workspacev1.WorkspaceControlClient
	// Admin calls its AdminControl.
	Admin workspacev1.AdminControlClient
	// Conn is Client's connection, for other services: health, reflection.
	Conn *grpc.ClientConn
	// Runtime is where the containers are: what runs with which environment, how
	// often anything was called, and hooks for each call.
	Runtime *runtimetest.Fake

	t      testing.TB // nil when made by Start
	dir    string     // database and key
	tmp    bool       // dir is ours to remove
	logger *slog.Logger
	limits server.Limits
	policy runtime.Policy

	mu        sync.Mutex
	daemon    *daemon.Daemon
	others    []*grpc.ClientConn // As's
	closeOnce sync.Once
	closeErr  error
}

// Option configures a Server.
type Option func(*Server)

// WithRuntime sets the runtime in place of one in which every image exists.
func WithRuntime(f *runtimetest.Fake) Option { return func(s *Server) { s.Runtime = f } }

// WithLimits sets what one caller can take; without it that is as much as it likes.
func WithLimits(l server.Limits) Option { return func(s *Server) { s.limits = l } }

// WithLogger sets where the server logs to; New logs to the test's output, Start
// nowhere.
func WithLogger(l *slog.Logger) Option { return func(s *Server) { s.logger = l } }

// WithPolicy sets what specs may ask of the machine, in the server and in the
// runtime. Without it that is what a daemon without settings allows: no
// privileged containers, no host paths.
func WithPolicy(p runtime.Policy) Option { return func(s *Server) { s.policy = p } }

// SetPolicy is WithPolicy for the server that Restart begins.
func (s *Server) SetPolicy(p runtime.Policy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policy = p
}

// New starts a server that lives as long as the test, and returns once it
// serves. When the test ends the server is stopped, everything that it started
// has ended, and its files are gone.
func New(t testing.TB, options ...Option) *Server {
	t.Helper()
	s := &Server{
		t:      t,
		dir:    t.TempDir(),
		logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if err := s.start(options); err != nil {
		t.Fatalf("servertest: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("servertest: %v", err)
		}
	})
	return s
}

// Start is New for where there is no testing.TB, such as TestMain. The caller
// calls Close.
func Start(options ...Option) (*Server, error) {
	dir, err := os.MkdirTemp("", "servertest-")
	if err != nil {
		return nil, fmt.Errorf("servertest: %w", err)
	}
	s := &Server{dir: dir, tmp: true, logger: slog.New(slog.DiscardHandler)}
	if err := s.start(options); err != nil {
		return nil, fmt.Errorf("servertest: %w", errors.Join(err, os.RemoveAll(dir)))
	}
	return s, nil
}

func (s *Server) start(options []Option) error {
	for _, o := range options {
		o(s)
	}
	if s.Runtime == nil {
		s.Runtime = runtimetest.NewFake(runtimetest.AllowAnyImage())
	}
	var err error
	if s.daemon, err = s.startDaemon(); err != nil {
		return err
	}
	s.Conn, err = s.connect(insecure.NewCredentials())
	if err != nil {
		return errors.Join(err, stop(s.daemon))
	}
	s.Client = workspacev1.NewWorkspaceControlClient(s.Conn)
	s.Admin = workspacev1.NewAdminControlClient(s.Conn)
	return nil
}

func (s *Server) connect(creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	return connect(s.dial, grpc.WithTransportCredentials(creds))
}

func connect(dial func(context.Context, string) (net.Conn, error), options ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///workspaced", append(options,
		grpc.WithContextDialer(dial),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: time.Millisecond, Multiplier: 1.5, MaxDelay: 50 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}))...)
}

// Client calls the server as somebody.
type Client struct {
	// Client, Admin and Conn are as those of a Server.
	Client workspacev1.WorkspaceControlClient
	Admin  workspacev1.AdminControlClient
	Conn   *grpc.ClientConn
}

// As returns a client whose calls are the subject's, until Close. Those of the
// Server itself are by one who may do everything.
func (s *Server) As(subject access.Subject) (*Client, error) {
	conn, err := s.connect(daemon.As(subject))
	if err != nil {
		return nil, fmt.Errorf("servertest: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.others = append(s.others, conn)
	return &Client{workspacev1.NewWorkspaceControlClient(conn), workspacev1.NewAdminControlClient(conn), conn}, nil
}

// AsContainer returns a client that calls as a container does which has the token:
// the variable WORKSPACE_TOKEN, or the file of that name, that workspace_api gives it.
// It is connected, until Close, to what the containers' socket is in a real daemon.
func (s *Server) AsContainer(token string) (*Client, error) {
	conn, err := connect(func(ctx context.Context, _ string) (net.Conn, error) {
		s.mu.Lock()
		d := s.daemon
		s.mu.Unlock()
		return d.DialContainers(ctx)
	}, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithPerRPCCredentials(bearer(token)))
	if err != nil {
		return nil, fmt.Errorf("servertest: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.others = append(s.others, conn)
	return &Client{workspacev1.NewWorkspaceControlClient(conn), workspacev1.NewAdminControlClient(conn), conn}, nil
}

// bearer is a token that goes with each call; empty: none.
type bearer string

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if b == "" {
		return nil, nil
	}
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (bearer) RequireTransportSecurity() bool { return false }

// dial connects to the daemon that is there now.
func (s *Server) dial(ctx context.Context, _ string) (net.Conn, error) {
	s.mu.Lock()
	d := s.daemon
	s.mu.Unlock()
	return d.Dial(ctx)
}

func (s *Server) startDaemon() (*daemon.Daemon, error) {
	return daemon.Start(daemon.Config{Dir: s.dir, Runtime: s.Runtime, Logger: s.logger, Policy: s.policy, Limits: s.limits})
}

// stop ends a daemon without waiting for what it does: nobody is left who would
// want to know.
func stop(d *daemon.Daemon) error {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return d.Shutdown(ctx)
}

// Close stops the server and waits for everything that it started. It may be
// called more than once; New's cleanup calls it.
func (s *Server) Close() error {
	s.closeOnce.Do(func() {
		s.mu.Lock()
		d := s.daemon
		for _, conn := range s.others {
			s.closeErr = errors.Join(s.closeErr, conn.Close())
		}
		s.mu.Unlock()
		s.closeErr = errors.Join(s.closeErr, s.Conn.Close(), stop(d))
		if s.tmp {
			s.closeErr = errors.Join(s.closeErr, os.RemoveAll(s.dir))
		}
	})
	return s.closeErr
}

// Restart ends the server as if it had been killed and starts it again on the
// same state and runtime. What runs in containers goes on running. Calls in
// flight end with UNAVAILABLE; when Restart returns, Client and Conn are
// connected to the new one.
func (s *Server) Restart() error {
	if err := s.replaceDaemon(); err != nil {
		return fmt.Errorf("servertest: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	for {
		// A call can still be sent on the old connection, and fails with it.
		_, err := healthv1.NewHealthClient(s.Conn).Check(ctx, &healthv1.HealthCheckRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("servertest: connect again: %w", err)
		}
	}
}

func (s *Server) replaceDaemon() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.daemon.Kill()
	if err := s.daemon.Wait(); err != nil {
		return err
	}
	d, err := s.startDaemon()
	if err != nil {
		return err
	}
	s.daemon = d
	return nil
}

// Drain makes the server refuse changes, and ends watches and waits, as on
// SIGTERM. It goes on answering reads until Close or Restart.
func (s *Server) Drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.daemon.API.Drain()
}

// HoldCycle holds the workspace's next cycle before it touches anything: the
// workspace stays as it is, reconciling, and its changes pending, until the gate
// is released. The workspace is given by its id or resource name.
func (s *Server) HoldCycle(workspace string) *runtimetest.Gate {
	return s.Runtime.Hold(runtimetest.Prepare, idOf(workspace))
}

// FailCycle makes each cycle of the workspace fail with the reason, which
// Workspace.last_error shows, until heal is called. Failed cycles are tried again
// with backoff; a change cuts the wait short.
func (s *Server) FailCycle(workspace string, reason runtime.Reason, message string) (heal func()) {
	return s.Runtime.Fail(runtimetest.Prepare, idOf(workspace), &runtime.Error{Reason: reason, Message: message}, 0)
}

func idOf(workspace string) string { return strings.TrimPrefix(workspace, "workspaces/") }

// WaitGeneration waits until a container of the generation (0: the newest) was
// started, and returns the workspace. It fails the test when that can't come
// about, or takes more than 30 seconds.
func (s *Server) WaitGeneration(name string, generation int64) *workspacev1.Workspace {
	if s.t != nil {
		s.t.Helper()
	}
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	resp, err := s.Client.WaitWorkspace(ctx, &workspacev1.WaitWorkspaceRequest{
		Name:       "workspaces/" + idOf(name),
		Generation: generation,
	})
	switch {
	case err == nil:
	case s.t != nil:
		s.t.Fatalf("servertest: wait for generation %d of %s: %v", generation, name, err)
	default:
		panic(fmt.Sprintf("servertest: wait for generation %d of %s: %v", generation, name, err))
	}
	return resp.GetWorkspace()
}
