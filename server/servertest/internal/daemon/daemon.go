// Package daemon is a process of workspaced as tests have it: everything that
// cmd/workspaced starts but sockets and containerd, in one value that can be shut
// down as SIGTERM does, or killed.
package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/loop"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// Config is what a Daemon is made from.
type Config struct {
	Dir     string // database and key; what is there goes on
	Runtime *runtimetest.Fake
	Logger  *slog.Logger
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Around does the steps of store and actors; nil: they are simply done.
	Around fault.Around
	// OnCommit is called after each commit, when actors and watchers know of it; it
	// may be nil.
	OnCommit func([]store.Change)
	// Limits are what one caller can take; zero: as much as it likes.
	Limits server.Limits
	// NoSweep: nobody sweeps.
	NoSweep bool
	// MaxConcurrentCycles is the supervisor's; 0: its default.
	MaxConcurrentCycles int
	// Policy says what specs may ask of the machine: the server's, and the runtime's
	// from the start on.
	Policy runtime.Policy
}

// Daemon runs from Start until the end of Shutdown, or of Kill and Wait.
type Daemon struct {
	Store      *store.Store
	Supervisor *workspace.Supervisor
	API        *server.Server

	fake     *runtimetest.Fake
	grpc     *grpc.Server
	listener *listener
	// Of containers.
	containerGRPC     *grpc.Server
	containerListener *listener
	loops             *loop.Group
	cancel            context.CancelFunc
	tasks             sync.WaitGroup // the supervisor and the gRPC server
	commits           gate

	mu    sync.Mutex
	errs  []error // of the tasks, before the end
	ended bool    // the runtime was told
}

// Start starts a daemon on what is there, and returns once it serves.
func Start(cfg Config) (*Daemon, error) {
	kek, err := seal.LoadOrCreate(filepath.Join(cfg.Dir, "key"))
	if err != nil {
		return nil, err
	}
	d := &Daemon{
		fake:     cfg.Runtime,
		listener: newListener(),

		containerListener: newListener(),
		loops:             loop.New(cfg.Logger),
	}
	hub := workspace.NewHub()
	d.Store, err = store.Open(store.Config{
		Path: filepath.Join(cfg.Dir, "workspaced.db"),
		KEK:  kek,
		OnCommit: func(changes []store.Change) {
			d.Supervisor.OnCommit(changes)
			hub.OnCommit(changes)
			if cfg.OnCommit != nil {
				cfg.OnCommit(changes)
			}
		},
		Now:    cfg.Now,
		Logger: cfg.Logger,
		Around: d.commits.around(cfg.Around),
	})
	if err != nil {
		return nil, err
	}
	cfg.Runtime.SetPolicy(cfg.Policy)
	d.Supervisor = workspace.New(workspace.Config{
		Store:               d.Store,
		Runtime:             cfg.Runtime.Daemon(),
		Logger:              cfg.Logger,
		MaxConcurrentCycles: cfg.MaxConcurrentCycles,
		Now:                 cfg.Now,
		Around:              cfg.Around,
	})
	authn := new(access.Authenticator)
	if authn.Tokens, err = access.NewTokens(d.Store, cfg.Now, authn.Recheck); err != nil {
		return nil, errors.Join(err, d.Store.Close())
	}
	d.API = server.New(server.Config{
		Authenticator: authn, Limits: cfg.Limits,
		Store: d.Store, Hub: hub, Logger: cfg.Logger, Version: "test", SpecPolicy: cfg.Policy,
		Health: access.ExposurePublic, Reflection: access.ExposureAuthenticated,
	})
	d.grpc = d.API.NewGRPC(grpc.WaitForHandlers(true), grpc.Creds(serverCredentials{}))
	var places atomic.Int64 // each connection comes from a place of its own
	containers := access.NewContainers(d.Store, cfg.Logger, func(net.Conn) (string, error) {
		return strconv.FormatInt(places.Add(1), 10), nil
	})
	d.containerGRPC = d.API.NewContainerGRPC(containers, grpc.WaitForHandlers(true))

	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	d.run(func() error { return d.Supervisor.Run(ctx) })
	d.run(func() error { return d.grpc.Serve(d.listener) })
	d.run(func() error { return d.containerGRPC.Serve(containers.Listen(d.containerListener)) })
	d.loops.Run(ctx, "hub", 3*workspace.HubBeat, hub.Run)
	d.loops.Every(ctx, "tokens", access.TendInterval, time.Minute, authn.Tend)
	if !cfg.NoSweep {
		d.loops.Every(ctx, "sweep", workspace.SweepInterval, workspace.SweepInterval, d.Supervisor.Sweep)
	}
	return d, nil
}

func (d *Daemon) run(task func() error) {
	d.tasks.Go(func() {
		err := task()
		if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, grpc.ErrServerStopped) || errors.Is(err, net.ErrClosed) {
			return
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if !d.ended {
			d.errs = append(d.errs, err)
		}
	})
}

// Dial connects to the daemon.
func (d *Daemon) Dial(ctx context.Context) (net.Conn, error) { return d.listener.DialContext(ctx) }

// DialContainers connects to the daemon as a container does.
func (d *Daemon) DialContainers(ctx context.Context) (net.Conn, error) {
	return d.containerListener.DialContext(ctx)
}

// Kill ends the daemon as kill -9 would, as far as a process can do that to a
// part of itself: its connections break, and what it does from now on reaches
// neither the disk nor a container. It does not wait, may be called from anywhere
// in the daemon, and more than once; Wait has to follow.
func (d *Daemon) Kill() {
	d.listener.cut()
	d.containerListener.cut()
	d.commits.close()
	d.end()
	d.cancel()
}

// end tells the runtime, once, that this process is no more.
func (d *Daemon) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.ended {
		d.ended = true
		d.fake.Crash()
	}
}

// Wait returns once nothing of a daemon that was killed runs any more.
func (d *Daemon) Wait() error {
	d.grpc.Stop()
	d.containerGRPC.Stop()
	d.tasks.Wait()
	d.loops.Wait()
	return d.close()
}

// Shutdown ends the daemon as SIGTERM does: calls and cycles in flight may finish
// until ctx ends.
func (d *Daemon) Shutdown(ctx context.Context) error {
	d.API.Drain()
	_ = d.Supervisor.Drain(ctx) // what is broken off is taken up at the next start
	graceful := make(chan struct{})
	go func() {
		defer close(graceful)
		var wg sync.WaitGroup
		wg.Go(d.grpc.GracefulStop)
		wg.Go(d.containerGRPC.GracefulStop)
		wg.Wait()
	}()
	select {
	case <-graceful:
	case <-ctx.Done():
		d.grpc.Stop()
		d.containerGRPC.Stop()
		<-graceful
	}
	d.cancel()
	d.tasks.Wait()
	d.loops.Wait()
	d.end() // with the process end its standbys
	return d.close()
}

func (d *Daemon) close() error {
	err := d.Store.Close() // without the lock: the last commit may be the one that a Kill meets
	d.mu.Lock()
	defer d.mu.Unlock()
	return errors.Join(append(d.errs, err)...)
}

// gate is what commits pass, until the daemon is killed.
type gate struct {
	mu     sync.RWMutex
	closed bool
}

var errKilled = errors.New("the daemon was killed")

// around lets a commit be the last one, or not happen: none is under way when
// close has returned.
func (g *gate) around(around fault.Around) fault.Around {
	return func(ctx context.Context, step string, do func(context.Context) error) error {
		pass := func(ctx context.Context) error {
			g.mu.RLock()
			defer g.mu.RUnlock()
			if g.closed {
				return errKilled
			}
			return do(ctx)
		}
		if around == nil {
			return pass(ctx)
		}
		return around(ctx, step, pass)
	}
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
}

// listener knows its connections, so that all can be broken at once.
type listener struct {
	*bufconn.Listener
	mu    sync.Mutex
	conns []net.Conn
	isCut bool
}

func newListener() *listener { return &listener{Listener: bufconn.Listen(64 << 10)} }

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, net.ErrClosed // bufconn has no other error
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isCut {
		_ = conn.Close()
		return nil, net.ErrClosed
	}
	l.conns = append(l.conns, conn)
	return conn, nil
}

// cut breaks all connections, and takes no new ones.
func (l *listener) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.isCut = true
	_ = l.Close()
	for _, conn := range l.conns {
		_ = conn.Close()
	}
	l.conns = nil
}
