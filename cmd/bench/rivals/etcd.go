package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

const startTimeout = 30 * time.Second

// etcd is a server of one member in this process, as durable as it comes, and
// connections to it over a unix socket.
type etcd struct {
	server      *embed.Etcd
	socket      string
	connections []*clientv3.Client
	keys        atomic.Int64
}

func startEtcd(ctx context.Context, dir string) (*etcd, error) {
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(dir, "etcd")
	cfg.LogLevel, cfg.LogOutputs = "fatal", []string{"stderr"} // it calls its own end an error
	// No port: sockets in the directory.
	client, peer := socketURL(filepath.Join(dir, "etcd.sock")), socketURL(filepath.Join(dir, "peer.sock"))
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	select {
	case <-server.Server.ReadyNotify():
		return &etcd{server: server, socket: client.String()}, nil
	case err = <-server.Err():
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(startTimeout):
		err = errors.New("does not start")
	}
	server.Close()
	return nil, fmt.Errorf("etcd: %w", err)
}

func socketURL(path string) url.URL { return url.URL{Scheme: "unix", Path: path} }

func (e *etcd) close() (err error) {
	for _, c := range e.connections {
		err = errors.Join(err, c.Close())
	}
	e.server.Close()
	return err
}

// connect sees to it that there are so many connections.
func (e *etcd) connect(ctx context.Context, n int) error {
	for len(e.connections) < n {
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{e.socket}, DialTimeout: startTimeout, Logger: zap.NewNop()})
		if err != nil {
			return fmt.Errorf("etcd client: %w", err)
		}
		e.connections = append(e.connections, c)
		if _, err := c.Put(ctx, "connected", ""); err != nil {
			return fmt.Errorf("etcd client: %w", err)
		}
	}
	return nil
}

// put puts values under 64 keys, over and over, as workspaced's row does with its
// workspaces.
func (e *etcd) put(ctx context.Context, req *Request) (Answer, error) {
	if req.Connections < 1 {
		return Answer{}, fmt.Errorf("%d connections", req.Connections)
	}
	if err := e.connect(ctx, req.Connections); err != nil {
		return Answer{}, err
	}
	value := make([]byte, req.Size)
	rand.Read(value)
	var mu sync.Mutex
	var failed error
	answer := Answer{Latencies: make([]int64, req.Ops)}
	answer.Nanoseconds = together(req.Clients, req.Ops, func(client, op int) bool {
		begin := time.Now()
		_, err := e.connections[client%req.Connections].Put(ctx, fmt.Sprintf("/workspaces/%d", e.keys.Add(1)%64), string(value))
		answer.Latencies[op] = int64(time.Since(begin))
		if err != nil {
			mu.Lock()
			defer mu.Unlock()
			failed = errors.Join(failed, err)
		}
		return err == nil
	})
	return answer, failed
}

// together has so many goroutines do operations until ops are done, or one fails.
func together(goroutines, ops int, do func(goroutine, op int) bool) (nanoseconds int64) {
	var next atomic.Int64
	var group sync.WaitGroup
	begin := time.Now()
	for g := range goroutines {
		group.Go(func() {
			for op := int(next.Add(1)) - 1; op < ops && do(g, op); op = int(next.Add(1)) - 1 {
			}
		})
	}
	group.Wait()
	return int64(time.Since(begin))
}
