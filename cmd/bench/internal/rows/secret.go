package rows

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

var secretRow = Row{
	Name:  "secret",
	What:  "an acknowledged SetSecret, by 1 client and by 64, over a connection each and over one",
	Limit: 2 * time.Minute,
	Run:   runSecret,
}

// secretBytes is the size of a value, a token's; ours is sealed.
const secretBytes = 64

// secretSizes says how much is measured.
type secretSizes struct {
	rounds int
	single int // operations a round and side, of one client
	many   int // the same, of all clients together; a fifth of it without group commit
	// clients is how many many are.
	clients int
}

// runSecret measures the daemon's stack in this process, as the etcd is in its
// own, on containers in memory: the workspaces are stopped, and what a container
// costs is another row's matter.
func runSecret(ctx context.Context, env *Env) (_ []measure.Result, err error) {
	dir, remove, err := env.temp("s")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	rival, err := env.startRivals(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rival.Close()) }()
	sizes := secretSizes{rounds: 7, single: 100, many: 4800, clients: 64}
	return measureSecret(ctx, dir, nil, rival.etcdPut, sizes)
}

// putFunc is rivals.etcdPut.
type putFunc func(clients, connections, ops, size int) (latencies measure.Samples, perSecond float64, err error)

// measureSecret measures our server beside a disk's and rivals' work, all in dir.
// around does the steps of store and actors, and may be nil; without etcd there is
// none beside.
func measureSecret(ctx context.Context, dir string, around aroundFunc, etcd putFunc, n secretSizes) (_ []measure.Result, err error) {
	ours, err := startSecretServer(ctx, dir, around)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, ours.close()) }()
	clients, closeClients, err := secretClients(ctx, ours.socket, n.clients)
	defer func() { err = errors.Join(err, closeClients()) }()
	if err != nil {
		return nil, err
	}
	file, err := os.Create(filepath.Join(dir, "page"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	db, err := bolt.Open(filepath.Join(dir, "bolt"), 0o600, nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	row := []byte("row")
	err = db.Update(func(tx *bolt.Tx) error { _, err := tx.CreateBucket(row); return err })
	if err != nil {
		return nil, err
	}

	// Every value is another one: an equal one would change nothing.
	sync4K := func(_ int, value []byte) error {
		page := make([]byte, 4096)
		copy(page, value)
		if _, err := file.WriteAt(page, 0); err != nil {
			return err
		}
		return syscall.Fdatasync(int(file.Fd()))
	}
	update := func(_ int, value []byte) error {
		return db.Update(func(tx *bolt.Tx) error { return tx.Bucket(row).Put(row, value) })
	}
	bare, closeBare, err := startBareUpdate(filepath.Join(dir, "bare"), func(value []byte) error { return update(0, value) })
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closeBare()) }()
	each := func(client int, value []byte) error { return clients[client].set(ctx, value) }
	sharing := make([]*secretClient, len(clients)) // one connection
	for i, c := range clients {
		sharing[i] = &secretClient{api: clients[0].api, secret: c.secret}
	}
	shared := func(client int, value []byte) error { return sharing[client].set(ctx, value) }
	call := func(_ int, value []byte) error {
		_, err := bare.SetSecret(ctx, &workspacev1.SetSecretRequest{Payload: &workspacev1.SetSecretRequest_Data{Data: value}})
		return err
	}

	var us, us1, floor, bbolt, rpc, other, other1 secretSide
	sides := []func() error{
		us.one(n.single, each), floor.one(n.single, sync4K), bbolt.one(n.single, update), rpc.one(n.single, call),
		us.many(n.clients, n.many, each), us1.many(n.clients, n.many, shared), bbolt.many(n.clients, n.many/5, update),
	}
	if etcd != nil {
		put := func(s *secretSide, clients, connections, ops int) func() error {
			return func() error {
				latencies, rate, err := etcd(clients, connections, ops, secretBytes)
				if clients == 1 {
					s.ms = append(s.ms, latencies...)
				} else {
					s.rate = append(s.rate, rate)
				}
				return err
			}
		}
		sides = append(sides, put(&other, 1, 1, n.single), put(&other, n.clients, n.clients, n.many), put(&other1, n.clients, 1, n.many))
	}
	for _, side := range sides { // warm up
		if err := side(); err != nil {
			return nil, err
		}
	}
	for _, s := range []*secretSide{&us, &us1, &floor, &bbolt, &rpc, &other, &other1} {
		*s = secretSide{}
	}
	if err := measure.Alternate(ctx, n.rounds, sides...); err != nil {
		return nil, err
	}

	manyEach, manyShared := fmt.Sprintf("secret/%d-clients", n.clients), fmt.Sprintf("secret/%d-clients-1-connection", n.clients)
	updates := fmt.Sprintf("plain bbolt Update by %d goroutines", n.clients)
	results := []measure.Result{
		measure.Compare("secret/1-client", "ms", us.ms, "plain bbolt Update of one row", bbolt.ms, measure.RatioAtMost(1.3)),
		measure.Compare("secret/1-client-call", "ms", us.ms, "a bare gRPC call around that Update", rpc.ms),
		measure.Compare("secret/1-client-disk", "ms", us.ms, "fdatasync of 4 KiB", floor.ms),
		measure.Compare(manyEach, "1/s", us.rate, updates, bbolt.rate, measure.RatioAtLeast(5)),
		measure.Compare(manyShared, "1/s", us1.rate, updates, bbolt.rate, measure.RatioAtLeast(5)),
	}
	if etcd != nil {
		results = append(results,
			measure.Compare("secret/1-client-etcd", "ms", us.ms, "etcd put", other.ms, measure.RatioAtMost(1)),
			measure.Compare(manyEach+"-etcd", "1/s", us.rate, "etcd put, likewise", other.rate, measure.RatioAtLeast(1)),
			measure.Compare(manyShared+"-etcd", "1/s", us1.rate, "etcd put, likewise", other1.rate, measure.RatioAtLeast(1)))
	}
	return results, nil
}

// secretSide is what was measured of one way to write.
type secretSide struct {
	ms   measure.Samples // latencies of one client
	rate measure.Samples // of many, a second
}

func (s *secretSide) one(ops int, f func(int, []byte) error) func() error {
	return func() error {
		latencies, _, err := secretLoad(1, ops, f)
		s.ms = append(s.ms, latencies...)
		return err
	}
}

func (s *secretSide) many(clients, ops int, f func(int, []byte) error) func() error {
	return func() error {
		_, rate, err := secretLoad(clients, ops, f)
		s.rate = append(s.rate, rate)
		return err
	}
}

// bareUpdate is the least that a server with bbolt does for an acknowledged change.
type bareUpdate struct {
	workspacev1.UnimplementedWorkspaceControlServer
	update func([]byte) error
}

func (b *bareUpdate) SetSecret(_ context.Context, req *workspacev1.SetSecretRequest) (*workspacev1.SetSecretResponse, error) {
	return &workspacev1.SetSecretResponse{}, b.update(req.GetData())
}

// startBareUpdate serves it on a socket, and returns a client.
func startBareUpdate(socket string, update func([]byte) error) (_ workspacev1.WorkspaceControlClient, closeAll func() error, err error) {
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	g := grpc.NewServer()
	workspacev1.RegisterWorkspaceControlServer(g, &bareUpdate{update: update})
	var serving errgroup.Group
	serving.Go(func() error { return g.Serve(listener) })
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		g.Stop()
		return nil, nil, errors.Join(err, serving.Wait())
	}
	return workspacev1.NewWorkspaceControlClient(conn), func() error {
		closeErr := conn.Close()
		g.Stop()
		return errors.Join(closeErr, serving.Wait())
	}, nil
}

// secretLoad has so many clients do ops operations in all, each one after the
// other, and returns how long each took, in ms, and how many were done a second.
func secretLoad(clients, ops int, f func(client int, value []byte) error) (latencies measure.Samples, rate float64, err error) {
	took := make([]measure.Samples, clients)
	failed := make([]error, clients)
	begin := time.Now()
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := c; i < ops && failed[c] == nil; i += clients {
				start := time.Now()
				failed[c] = f(c, fmt.Appendf(nil, "%0*d", secretBytes, start.UnixNano()))
				took[c].Add(time.Since(start), time.Millisecond)
			}
		})
	}
	wg.Wait()
	rate = float64(ops) / time.Since(begin).Seconds()
	for _, t := range took {
		latencies = append(latencies, t...)
	}
	return latencies, rate, errors.Join(failed...)
}

// secretClient is a connection, and the secret of a workspace of its own.
type secretClient struct {
	api        workspacev1.WorkspaceControlClient
	secret     string
	generation int64
}

// secretClients makes clients of the server. Their workspaces are stopped: what
// a container costs is another row's matter. The caller closes also what was made
// when there is an error.
func secretClients(ctx context.Context, socket string, n int) (clients []*secretClient, closeAll func() error, err error) {
	var conns []*grpc.ClientConn
	closeAll = func() error {
		var errs []error
		for _, conn := range conns {
			errs = append(errs, conn.Close())
		}
		return errors.Join(errs...)
	}
	for i := range n {
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, closeAll, err
		}
		conns = append(conns, conn)
		id := fmt.Sprintf("w%d", i)
		c := &secretClient{api: workspacev1.NewWorkspaceControlClient(conn), secret: "workspaces/" + id + "/secrets/TOKEN"}
		clients = append(clients, c)
		_, err = c.api.CreateWorkspace(ctx, &workspacev1.CreateWorkspaceRequest{
			WorkspaceId: id, Workspace: &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{Image: "registry.invalid/app:1"}},
		})
		if err != nil {
			return nil, closeAll, err
		}
		if _, err := c.api.StopWorkspace(ctx, &workspacev1.StopWorkspaceRequest{Name: "workspaces/" + id}); err != nil {
			return nil, closeAll, err
		}
	}
	return clients, closeAll, nil
}

// set sets the secret, which makes a new generation.
func (c *secretClient) set(ctx context.Context, value []byte) error {
	resp, err := c.api.SetSecret(ctx, &workspacev1.SetSecretRequest{
		Name: c.secret, Payload: &workspacev1.SetSecretRequest_Data{Data: value},
	})
	if err != nil {
		return err
	}
	if !resp.GetChanged() || resp.GetGeneration() <= c.generation {
		return fmt.Errorf("%s: generation %d after %d", c.secret, resp.GetGeneration(), c.generation)
	}
	c.generation = resp.GetGeneration()
	return nil
}

// secretServer is the daemon's server in this process, with all that a change
// meets: interceptors, log, store and actors.
type secretServer struct {
	socket string

	log    *os.File
	store  *store.Store
	grpc   *grpc.Server
	cancel context.CancelFunc
	tasks  errgroup.Group
}

// startSecretServer starts it; the caller closes it, before ctx ends.
func startSecretServer(ctx context.Context, dir string, around aroundFunc) (_ *secretServer, err error) {
	s := &secretServer{socket: filepath.Join(dir, "s")}
	ctx, s.cancel = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		return nil, err
	}
	log := slog.New(slog.NewTextHandler(s.log, nil)) // as the daemon's
	kek, err := seal.LoadOrCreate(filepath.Join(dir, "key"))
	if err != nil {
		return nil, err
	}
	hub := workspace.NewHub()
	var supervisor *workspace.Supervisor
	s.store, err = store.Open(store.Config{
		Path: filepath.Join(dir, "db"), KEK: kek, Logger: log, Around: around,
		OnCommit: func(changes []store.Change) {
			supervisor.OnCommit(changes)
			hub.OnCommit(changes)
		},
	})
	if err != nil {
		return nil, err
	}
	fake := runtimetest.NewFake(runtimetest.AllowAnyImage())
	supervisor = workspace.New(workspace.Config{Store: s.store, Runtime: fake.Daemon(), Logger: log, Around: around})
	listener, err := net.Listen("unix", s.socket)
	if err != nil {
		return nil, err
	}
	s.grpc = server.New(server.Config{Store: s.store, Hub: hub, Logger: log}).NewGRPC(unixCredentials())
	for _, run := range []func() error{
		func() error { return supervisor.Run(ctx) },
		func() error { return hub.Run(ctx, func() {}) },
		func() error { return s.grpc.Serve(listener) },
	} {
		s.tasks.Go(func() error {
			if err := run(); ctx.Err() == nil {
				return err
			}
			return nil
		})
	}
	return s, nil
}

// close ends it, also one that was started half way.
func (s *secretServer) close() error {
	s.cancel()
	if s.grpc != nil {
		s.grpc.Stop()
	}
	errs := []error{s.tasks.Wait()}
	if s.store != nil {
		errs = append(errs, s.store.Close())
	}
	if s.log != nil {
		errs = append(errs, s.log.Close())
	}
	return errors.Join(errs...)
}
