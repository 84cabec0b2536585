package servertest_test

import (
	"context"
	"fmt"
	"slices"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/servertest"
)

// A service changes a secret and waits until the workspace runs with it.
func Example() {
	s, err := servertest.Start() // in a test: s := servertest.New(t)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = s.Close() }()
	ctx := context.Background()

	created, err := s.Client.CreateWorkspace(ctx, &workspacev1.CreateWorkspaceRequest{
		WorkspaceId: "shop",
		Workspace:   &workspacev1.Workspace{Spec: &workspacev1.WorkspaceSpec{Image: "registry.example/shop:1"}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	s.WaitGeneration("shop", created.GetGeneration())

	// The next cycle is held: what the service does meanwhile is pending.
	gate := s.HoldCycle("shop")
	set, err := s.Client.SetSecret(ctx, &workspacev1.SetSecretRequest{
		Name:    "workspaces/shop/secrets/API_KEY",
		Payload: &workspacev1.SetSecretRequest_Text{Text: "s3cret"},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	got, err := s.Client.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: "workspaces/shop"})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("generation", got.GetWorkspace().GetGeneration(), "runs", got.GetWorkspace().GetObservedGeneration())

	gate.Release()
	now := s.WaitGeneration("shop", set.GetGeneration())
	fmt.Println("generation", now.GetGeneration(), "runs", now.GetObservedGeneration())
	fmt.Println(slices.Contains(s.Runtime.Env(now.GetContainerId()), "API_KEY=s3cret"))

	// Output:
	// generation 2 runs 1
	// generation 2 runs 2
	// true
}
