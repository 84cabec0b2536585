package rows

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"

	"github.com/workspaced/workspaced/cmd/bench/internal/measure"
	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

var watchRow = Row{
	Name:  "watch",
	What:  "a commit until the last of 1,000 watchers has it, beside a bare fan-out; and watchers that do not read",
	Limit: 2 * time.Minute,
	Run: func(ctx context.Context, env *Env) ([]measure.Result, error) {
		return watch(ctx, env, watchSizes{watchers: 1000, deaf: 100, conns: 100, rounds: 100})
	},
}

// watchSizes say how much is measured.
type watchSizes struct {
	watchers int    // streams to a server
	deaf     int    // how many of them do not read, where some don't
	conns    int    // connections that share a server's streams
	rounds   int    // events
	slow     func() // nil, or a further step between a commit and its fan-out
}

// watch measures on unix sockets, with server and clients in this process: on
// both sides the clients do the same, which is to count what they get.
func watch(ctx context.Context, env *Env, sizes watchSizes) (_ []measure.Result, err error) {
	dir, remove, err := env.temp("watch")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	if sizes.slow == nil {
		sizes.slow = func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	all, err := startWatched(ctx, filepath.Join(dir, "all"), sizes, sizes.watchers, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, all.close()) }()
	event, err := all.event(ctx)
	if err != nil {
		return nil, err
	}
	bare, err := startFanOut(ctx, filepath.Join(dir, "bare"), sizes, event)
	if err != nil {
		return nil, err
	}
	defer bare.close()
	hearing := sizes.watchers - sizes.deaf
	fewer, err := startWatched(ctx, filepath.Join(dir, "fewer"), sizes, hearing, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, fewer.close()) }()
	deaf, err := startWatched(ctx, filepath.Join(dir, "deaf"), sizes, hearing, sizes.deaf)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, deaf.close()) }()

	var ours, fanOut, alone, company, commitAlone, commitCompany, unused measure.Samples
	err = measure.Alternate(ctx, sizes.rounds,
		func() error { return all.round(ctx, &ours, &unused) },
		func() error { return bare.round(ctx, &fanOut) },
		func() error { return fewer.round(ctx, &alone, &commitAlone) },
		func() error { return deaf.round(ctx, &company, &commitCompany) })
	if err != nil {
		return nil, err
	}
	hints, sends, err := hintAll(ctx, sizes)
	if err != nil {
		return nil, err
	}
	name := func(format string, args ...any) string { return "watch/" + fmt.Sprintf(format, args...) }
	return []measure.Result{
		measure.Compare(name("event to %d on %d connections", sizes.watchers, sizes.conns), "ms", ours,
			"a bare gRPC fan-out over channels", fanOut, measure.RatioAtMost(2)),
		measure.Compare(name("hint to %d in process", sizes.watchers), "ms", hints,
			"a send to as many channels", sends, measure.RatioAtMost(2)),
		measure.Compare(name("event to %d beside %d that do not read", hearing, sizes.deaf), "ms", company,
			"the same without them", alone, measure.RatioAtMost(1.1)),
		measure.Compare(name("commit beside %d that do not read", sizes.deaf), "ms", commitCompany,
			"the same without them", commitAlone, measure.RatioAtMost(1.1)),
	}, nil
}

// listeners are streams that count what they get.
type listeners struct {
	missing atomic.Int64   // messages until heard
	heard   chan time.Time // size 1: when the last one came
	conns   []*grpc.ClientConn
	readers sync.WaitGroup
}

// await is called before what makes n messages come, and its result after.
func (l *listeners) await(n int) func(context.Context) (time.Time, error) {
	l.missing.Store(int64(n))
	return func(ctx context.Context) (time.Time, error) {
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		select {
		case last := <-l.heard:
			return last, nil
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("%d messages did not come: %w", l.missing.Load(), ctx.Err())
		}
	}
}

// open opens n watches that end with ctx, spread over the connections.
func (l *listeners) open(ctx context.Context, socket string, n, conns int, options ...grpc.DialOption) ([]grpc.ClientStream, error) {
	streams := make([]grpc.ClientStream, n)
	var conn *grpc.ClientConn
	for i := range streams {
		if i%max(1, n/conns) == 0 {
			var err error
			conn, err = grpc.NewClient("unix://"+socket, append(options,
				grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithDefaultCallOptions(grpc.ForceCodecV2(lengths{encoding.GetCodecV2("proto")})))...)
			if err != nil {
				return nil, err
			}
			l.conns = append(l.conns, conn)
		}
		stream, err := conn.NewStream(ctx, &workspacev1.WorkspaceControl_ServiceDesc.Streams[0], workspacev1.WorkspaceControl_WatchWorkspaces_FullMethodName)
		if err == nil {
			err = errors.Join(stream.SendMsg(&workspacev1.WatchWorkspacesRequest{}), stream.CloseSend())
		}
		if err != nil {
			return nil, err
		}
		streams[i] = stream
	}
	return streams, nil
}

// listen reads the streams until they end.
func (l *listeners) listen(streams []grpc.ClientStream) {
	for _, s := range streams {
		l.readers.Go(func() {
			for {
				var n int
				if s.RecvMsg(&n) != nil {
					return // at the end of the row; who waits for messages sees any other
				}
				if l.missing.Add(-1) == 0 {
					l.heard <- time.Now()
				}
			}
		})
	}
}

func (l *listeners) close() {
	for _, c := range l.conns {
		_ = c.Close() // which ends the streams
	}
	l.readers.Wait()
}

// lengths takes the length of a message for all of it: what clients do with
// events is not what is measured.
type lengths struct{ encoding.CodecV2 }

func (lengths) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*int) = data.Len()
	return nil
}

// watched is a server of ours over a store with one workspace, and its watchers.
type watched struct {
	listeners
	st        *store.Store
	socket    string
	hearing   int
	n         int
	committed atomic.Pointer[time.Time]
	end       func() // of server and hub
}

func startWatched(ctx context.Context, dir string, sizes watchSizes, hearing, deaf int) (_ *watched, err error) {
	w := &watched{socket: filepath.Join(dir, "s"), hearing: hearing}
	w.heard = make(chan time.Time, 1)
	hub := workspace.NewHub()
	if err := w.openStore(ctx, dir, func(changes []store.Change) {
		now := time.Now()
		w.committed.Store(&now)
		sizes.slow()
		hub.OnCommit(changes)
	}); err != nil {
		return nil, err
	}
	api := server.New(server.Config{Store: w.st, Hub: hub, Logger: slog.New(slog.DiscardHandler)})
	stopServer, err := serveOn(api.NewGRPC(grpc.WaitForHandlers(true), unixCredentials()), w.socket)
	if err != nil {
		return nil, errors.Join(err, w.st.Close())
	}
	hubCtx, stopHub := context.WithCancel(context.WithoutCancel(ctx))
	hubbed := make(chan struct{})
	go func() {
		defer close(hubbed)
		_ = hub.Run(hubCtx, func() {}) // nil
	}()
	w.end = func() {
		stopServer()
		stopHub()
		<-hubbed
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	wait := w.await(hearing * 2) // the workspace, and that it was all
	streams, err := w.open(ctx, w.socket, hearing, sizes.conns)
	if err != nil {
		return nil, err
	}
	w.listen(streams)
	if _, err := wait(ctx); err != nil {
		return nil, err
	}
	if deaf == 0 {
		return w, nil
	}
	// Windows that do not grow, and more than they hold.
	if _, err := w.open(ctx, w.socket, deaf, max(1, deaf/10), grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(16<<20)); err != nil {
		return nil, err
	}
	for range 8 {
		if err := w.change(ctx, strings.Repeat("x", 48<<10)); err != nil {
			return nil, err
		}
	}
	return w, w.change(ctx, usualValue)
}

// openStore opens a store with a workspace.
func (w *watched) openStore(ctx context.Context, dir string, onCommit func([]store.Change)) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	kek, err := seal.LoadOrCreate(filepath.Join(dir, "key"))
	if err != nil {
		return err
	}
	if w.st, err = store.Open(store.Config{Path: filepath.Join(dir, "db"), KEK: kek, OnCommit: onCommit}); err != nil {
		return err
	}
	_, err = w.st.CreateWorkspace(ctx, store.NewWorkspace{
		ID:     "shop",
		Labels: map[string]string{"team": "a"},
		Spec:   store.Spec{Image: "registry.example/team/app:1", Env: map[string]string{"TEXT": usualValue, "N": "0"}},
	}, store.Options{})
	if err != nil {
		return errors.Join(err, w.st.Close())
	}
	return nil
}

// usualValue makes an event about as large as one usually is.
var usualValue = strings.Repeat("x", 500)

// change changes the workspace, and returns once all that hear have heard.
func (w *watched) change(ctx context.Context, value string) error {
	wait := w.await(w.hearing)
	if err := w.commit(ctx, value); err != nil {
		return err
	}
	_, err := wait(ctx)
	return err
}

func (w *watched) commit(ctx context.Context, value string) error {
	w.n++
	_, err := w.st.UpdateWorkspace(ctx, "shop", func(e *store.Editable) error {
		e.Spec.Env = map[string]string{"TEXT": value, "N": fmt.Sprint(w.n)}
		return nil
	}, store.Options{})
	return err
}

// round adds how long a change takes that nobody waits for, and how long after it
// the last watcher has heard, in ms.
func (w *watched) round(ctx context.Context, heard, commit *measure.Samples) error {
	wait := w.await(w.hearing)
	begin := time.Now()
	if err := w.commit(ctx, usualValue); err != nil {
		return err
	}
	last, err := wait(ctx)
	if err != nil {
		return err
	}
	committed := *w.committed.Load()
	commit.Add(committed.Sub(begin), time.Millisecond)
	heard.Add(last.Sub(committed), time.Millisecond)
	return nil
}

// event returns one as the watchers get it.
func (w *watched) event(ctx context.Context) (*workspacev1.WatchWorkspacesResponse, error) {
	conn, err := grpc.NewClient("unix://"+w.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := workspacev1.NewWorkspaceControlClient(conn).WatchWorkspaces(ctx, &workspacev1.WatchWorkspacesRequest{})
	if err != nil {
		return nil, err
	}
	return stream.Recv()
}

func (w *watched) close() error {
	w.listeners.close()
	w.end()
	return w.st.Close()
}

// fanOut is the least that a server can do: handlers that receive a message from a
// channel and send it.
type fanOut struct {
	workspacev1.UnimplementedWorkspaceControlServer
	listeners
	event *workspacev1.WatchWorkspacesResponse
	stop  func()

	mu       sync.Mutex
	channels []chan *workspacev1.WatchWorkspacesResponse
}

func startFanOut(ctx context.Context, socket string, sizes watchSizes, event *workspacev1.WatchWorkspacesResponse) (_ *fanOut, err error) {
	f := &fanOut{event: event}
	f.heard = make(chan time.Time, 1)
	g := grpc.NewServer(grpc.WaitForHandlers(true))
	workspacev1.RegisterWorkspaceControlServer(g, f)
	if f.stop, err = serveOn(g, socket); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	wait := f.await(sizes.watchers)
	streams, err := f.open(ctx, socket, sizes.watchers, sizes.conns)
	if err != nil {
		return nil, err
	}
	f.listen(streams)
	_, err = wait(ctx)
	return f, err
}

// WatchWorkspaces implements workspacev1.WorkspaceControlServer.
func (f *fanOut) WatchWorkspaces(_ *workspacev1.WatchWorkspacesRequest, stream grpc.ServerStreamingServer[workspacev1.WatchWorkspacesResponse]) error {
	events := make(chan *workspacev1.WatchWorkspacesResponse, 1)
	f.mu.Lock()
	f.channels = append(f.channels, events)
	f.mu.Unlock()
	for e := f.event; ; { // the first one says that it listens
		if err := stream.Send(e); err != nil {
			return err
		}
		select {
		case e = <-events:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// round adds how long it takes from the first send until the last has heard, in ms.
func (f *fanOut) round(ctx context.Context, heard *measure.Samples) error {
	wait := f.await(len(f.channels))
	begin := time.Now()
	for _, c := range f.channels {
		c <- f.event
	}
	last, err := wait(ctx)
	if err != nil {
		return err
	}
	heard.Add(last.Sub(begin), time.Millisecond)
	return nil
}

func (f *fanOut) close() {
	f.listeners.close()
	f.stop()
}

// hintAll measures the hub alone: how long until the last of its watchers has
// woken, and the last of as many goroutines that something was sent to, in ms.
func hintAll(ctx context.Context, sizes watchSizes) (hints, sends measure.Samples, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var ended sync.WaitGroup
	defer ended.Wait()
	defer cancel()
	woken := func(l *listeners, wake <-chan struct{}) {
		ended.Go(func() {
			for {
				select {
				case <-wake:
				case <-ctx.Done():
					return
				}
				if l.missing.Add(-1) == 0 {
					l.heard <- time.Now()
				}
			}
		})
	}
	hub := workspace.NewHub()
	ended.Go(func() { _ = hub.Run(ctx, func() {}) }) // nil
	var ours, bare listeners
	ours.heard, bare.heard = make(chan time.Time, 1), make(chan time.Time, 1)
	channels := make([]chan struct{}, sizes.watchers)
	for i := range channels {
		hint, stop := hub.Watch("")
		defer stop()
		woken(&ours, hint)
		channels[i] = make(chan struct{}, 1)
		woken(&bare, channels[i])
	}
	round := func(into *measure.Samples, l *listeners, send func()) func() error {
		return func() error {
			wait := l.await(sizes.watchers)
			begin := time.Now()
			send()
			last, err := wait(ctx)
			into.Add(last.Sub(begin), time.Millisecond)
			return err
		}
	}
	changes := []store.Change{{ID: "shop"}}
	err = measure.Alternate(ctx, sizes.rounds,
		round(&hints, &ours, func() { sizes.slow(); hub.OnCommit(changes) }),
		round(&sends, &bare, func() {
			for _, c := range channels {
				c <- struct{}{}
			}
		}))
	return hints, sends, err
}
