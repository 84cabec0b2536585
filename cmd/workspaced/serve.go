package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/workspaced/workspaced/cmd/workspaced/internal/embedded"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/loop"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// serve is the daemon: it starts everything in order, runs until ctx ends or a
// signal comes, and ends everything in the reverse order.
func serve(ctx context.Context, cfg config, log *slog.Logger) error {
	if os.Geteuid() != 0 {
		return errRoot
	}
	if err := setCoreDumps(cfg.CoreDumps); err != nil {
		return err
	}
	if err := checkFiles(cfg); err != nil {
		return err
	}
	door, err := newDoor(cfg, log)
	if err != nil {
		return err
	}
	soft, hard, release := stopSignals(ctx, log)
	defer release()

	lock, err := lockState(cfg)
	if err != nil {
		return err
	}
	defer lock.release()

	hub, commits := workspace.NewHub(), new(commitCounter)
	var supervisor *workspace.Supervisor // set before anything is committed
	st, err := openStore(soft, cfg, log, func(changes []store.Change) {
		supervisor.OnCommit(changes)
		hub.OnCommit(changes)
		commits.OnCommit(changes)
	})
	if err != nil {
		return startError(soft, log, err)
	}
	defer func() {
		if err := st.Close(); err != nil {
			log.Error("the database was not closed well", "error", err)
		}
	}()

	address, private, err := findContainerd(soft, cfg, log)
	if err != nil {
		return startError(soft, log, err)
	}
	if private != nil {
		defer private.Close(hard)
	}
	driver, err := openDriver(soft, cfg, address, st.InstanceUID(), log)
	if err != nil {
		return startError(soft, log, err)
	}
	defer func() {
		if err := driver.Close(); err != nil {
			log.Warn("the connection to containerd was not closed well", "error", err)
		}
	}()
	for _, path := range cfg.ImportImages {
		names, err := driver.ImportFile(soft, path)
		if err != nil {
			return startError(soft, log, fmt.Errorf("import_images: %s: %w", path, err))
		}
		log.Info("image imported", "path", path, "names", names)
	}

	supervisor = workspace.New(workspace.Config{
		Store:               st,
		Runtime:             driver,
		Logger:              log,
		MaxConcurrentCycles: cfg.MaxConcurrentCycles,
		Around:              faultPoints(),
	})
	if door.authn.Tokens, err = access.NewTokens(st, nil, door.authn.Recheck); err != nil {
		return err
	}
	defer door.flush(hard, log) // before the store is closed
	limits, err := cfg.limits()
	if err != nil {
		return err
	}
	api := server.New(server.Config{
		Authenticator: &door.authn, Limits: limits,
		Store: st, Hub: hub, Logger: log, Version: version, SpecPolicy: cfg.policy(),
		Health: access.Exposure(cfg.Health), Reflection: access.Exposure(cfg.Reflection),
	})
	sockets, err := listen(soft, cfg)
	if err != nil {
		return err
	}
	containers := access.NewContainers(st, log, nil)
	d := &running{
		cfg: cfg, log: log, sockets: sockets,
		store: st, driver: driver, supervisor: supervisor, hub: hub,
		api: api, grpc: api.NewGRPC(grpc.Creds(door.creds)), commits: commits,
		containerd: address, private: private, loops: loop.New(log), door: door,
		containers: containers, containerGRPC: api.NewContainerGRPC(containers),
	}
	return d.run(soft, hard)
}

// startError is what ends a start: nothing to complain of if it was told to end.
func startError(soft context.Context, log *slog.Logger, err error) error {
	if soft.Err() != nil {
		log.Info("stopped while starting", "error", err)
		return nil
	}
	return err
}

// running is the daemon after its start.
type running struct {
	cfg        config
	log        *slog.Logger
	sockets    *listeners
	store      *store.Store
	driver     *ctrd.Driver
	supervisor *workspace.Supervisor
	hub        *workspace.Hub
	api        *server.Server
	grpc       *grpc.Server
	commits    *commitCounter
	containerd string               // its address
	private    *embedded.Containerd // nil: it is not ours
	loops      *loop.Group
	door       *door
	// What containers call.
	containers    *access.Containers
	containerGRPC *grpc.Server
}

// run is the process as tasks: the first error, or the end of soft, ends all of
// them, and all are waited for. Beside them are the loops of the background,
// whose errors end nothing.
func (d *running) run(soft, hard context.Context) error {
	tasks, stopping := errgroup.WithContext(soft)
	actors, endActors := context.WithCancel(context.WithoutCancel(soft))
	defer endActors()
	// That it can't read the database at boot is fatal: the file was checked a
	// moment ago, so it is the disk that fails, and the service manager's restart
	// checks the file again before anything else is tried.
	tasks.Go(func() error { return d.supervisor.Run(actors) })
	d.background(actors)
	d.api.PublishLoops(d.status()) // before the first call
	if l := d.sockets.metrics; l != nil {
		m := &metrics{loops: d.status, commits: d.commits, supervisor: d.supervisor, limited: d.api.LimitRefusals, refused: d.sockets.refused}
		tasks.Go(func() error { return newMetricsServer(m, l, d.log).run(actors) })
	}
	for _, l := range d.sockets.api {
		tasks.Go(func() error {
			if err := d.grpc.Serve(l); err != nil {
				return fmt.Errorf("serve on %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	tasks.Go(func() error {
		l := d.containers.Listen(d.sockets.containers)
		if err := d.containerGRPC.Serve(l); err != nil {
			return fmt.Errorf("serve on %s: %w", l.Addr(), err)
		}
		return nil
	})
	tasks.Go(func() error {
		<-stopping.Done()
		d.drain(hard)
		endActors()
		return nil
	})
	d.log.Info("ready", "socket", d.cfg.Socket, "listen", d.cfg.Listen, "metrics_listen", d.cfg.MetricsListen, "pid", os.Getpid(), "version", version)
	notify(d.log, daemon.SdNotifyReady)
	err := tasks.Wait()
	d.loops.Wait()
	if err != nil {
		d.log.Error("stopped, containers go on running", "error", err)
		return err
	}
	d.log.Info("stopped, containers go on running")
	return nil
}

// drain lets calls and cycles in flight finish, up to the drain timeout or the
// end of hard. What is not finished then stands on disk and is taken up at the
// next start.
func (d *running) drain(hard context.Context) {
	notify(d.log, daemon.SdNotifyStopping)
	d.log.Info("draining", "timeout", d.cfg.DrainTimeout)
	ctx, cancel := context.WithTimeout(hard, d.cfg.DrainTimeout)
	defer cancel()
	d.api.Drain()
	if err := d.supervisor.Drain(ctx); err != nil {
		d.log.Warn("cycles in flight are broken off, they are taken up at the next start", "error", err)
	}
	if !d.api.Shutdown(ctx, d.grpc, d.containerGRPC) {
		d.log.Warn("calls in flight were broken off")
	}
}

// stopSignals returns a context that ends with the first SIGTERM or SIGINT, or
// with ctx, and one that ends with the second. A third one has its usual effect.
func stopSignals(ctx context.Context, log *slog.Logger) (soft, hard context.Context, release func()) {
	soft, cancelSoft := context.WithCancel(ctx)
	hard, cancelHard := context.WithCancel(context.WithoutCancel(ctx))
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for _, cancel := range []func(){cancelSoft, cancelHard} {
			select {
			case s := <-signals:
				log.Info("signal", "signal", s.String())
				cancel()
			case <-done:
				return
			}
		}
		signal.Stop(signals)
	}()
	return soft, hard, func() {
		signal.Stop(signals)
		close(done)
		<-ended
		cancelSoft()
		cancelHard()
	}
}
