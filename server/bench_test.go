package server_test

import (
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/servertest"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"

	"github.com/workspaced/workspaced/server"
)

// benchServer is a server over a store of its own without actors.
func benchServer(b *testing.B) workspacev1.WorkspaceControlClient {
	b.Helper()
	dir := b.TempDir()
	kek, err := seal.LoadOrCreate(filepath.Join(dir, "key"))
	if err != nil {
		b.Fatal(err)
	}
	st, err := store.Open(store.Config{Path: filepath.Join(dir, "db"), KEK: kek})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := st.Close(); err != nil {
			b.Error(err)
		}
	})
	conn := listen(b, server.New(server.Config{Store: st, Hub: make(hints), Logger: slog.New(slog.DiscardHandler)}), access.Everything("test"))
	return workspacev1.NewWorkspaceControlClient(conn)
}

// BenchmarkListWorkspaces: by name, the last of many pages costs what the first
// one does.
func BenchmarkListWorkspaces(b *testing.B) {
	client := benchServer(b)
	const n = 5000
	ids := make(chan int)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for i := range ids {
				if _, err := client.CreateWorkspace(b.Context(), &createReq{WorkspaceId: fmt.Sprintf("w%05d", i), Workspace: &ws{Spec: spec()}}); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for i := range n {
		ids <- i
	}
	close(ids)
	wg.Wait()
	req := &workspacev1.ListWorkspacesRequest{PageSize: 10}
	tokens := []string{""}
	for {
		resp, err := client.ListWorkspaces(b.Context(), req)
		if err != nil {
			b.Fatal(err)
		}
		if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
			break
		}
		tokens = append(tokens, req.PageToken)
	}
	for name, token := range map[string]string{"first": tokens[0], "last": tokens[len(tokens)-1]} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := client.ListWorkspaces(b.Context(), &workspacev1.ListWorkspacesRequest{PageSize: 10, PageToken: token}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("create_time", func(b *testing.B) {
		for b.Loop() {
			if _, err := client.ListWorkspaces(b.Context(), &workspacev1.ListWorkspacesRequest{PageSize: 10, OrderBy: "create_time"}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkSetSecret is a durable change, by one caller and by many.
func BenchmarkSetSecret(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			client := benchServer(b)
			if _, err := client.CreateWorkspace(b.Context(), &createReq{WorkspaceId: "w", Workspace: &ws{Spec: spec()}}); err != nil {
				b.Fatal(err)
			}
			var n atomic.Int64
			b.SetParallelism(callers)
			set := func() error {
				_, err := client.SetSecret(b.Context(), &workspacev1.SetSecretRequest{
					Name: "workspaces/w/secrets/A", Payload: &workspacev1.SetSecretRequest_Text{Text: fmt.Sprint(n.Add(1))},
				})
				return err
			}
			if callers == 1 {
				for b.Loop() {
					if err := set(); err != nil {
						b.Fatal(err)
					}
				}
				return
			}
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := set(); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}

// BenchmarkServer is what a test pays for a server of its own.
func BenchmarkServer(b *testing.B) {
	for b.Loop() {
		s, err := servertest.Start()
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
