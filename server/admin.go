package server

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
)

// admin serves workspace.v1.AdminControl.
type admin struct {
	// A missing RPC does not compile.
	workspacev1.UnsafeAdminControlServer

	server *Server
}

var _ workspacev1.AdminControlServer = admin{}

// GetServerInfo implements workspace.v1.AdminControl.
func (a admin) GetServerInfo(ctx context.Context, _ *workspacev1.GetServerInfoRequest) (*workspacev1.GetServerInfoResponse, error) {
	keys, err := a.server.dataKeys(ctx)
	if err != nil {
		return nil, err
	}
	return &workspacev1.GetServerInfoResponse{
		Version:     a.server.version,
		DatabaseUid: a.server.store.InstanceUID(),
		StartTime:   timestamppb.New(a.server.started),
		Caller:      callerToProto(access.SubjectOf(ctx)),

		AuditLogProblem: a.server.auditProblemFound(),
		DataKeys:        keys,
	}, nil
}

func callerToProto(s access.Subject) *workspacev1.Caller {
	c := &workspacev1.Caller{Subject: s.Name, ExpireTime: timeToProto(s.Expires)}
	for _, g := range s.Grants {
		c.Grants = append(c.Grants, &workspacev1.AccessGrant{Roles: g.Roles.List(), Scope: scopeToProto(g.Scope)})
	}
	return c
}

// scopeToProto returns nil for everything.
func scopeToProto(s access.Scope) *workspacev1.AccessScope {
	if s.All() {
		return nil
	}
	return &workspacev1.AccessScope{Workspaces: s.Workspaces, Labels: cloneMap(s.Labels)}
}
